"""The `data:` section of a config: image pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from diffalign.config import MAY_CHANGE
from diffalign.data.decoding import MAX_PIXELS
from diffalign.data.held_out import check_share
from diffalign.data.pairs.scores import ScoresConfig
from diffalign.data.strength.base import SCORES
from diffalign.data.strength.settings import StrengthConfig
from diffalign.ranges import AtLeast, Between, Ranged


@dataclass(frozen=True, kw_only=True)
class PairConfig(Ranged):
    """Preference pairs of images, or preferred images alone: where they lie, what they mean, how
    they are cut to size.

    Defaults marked DPO are those of `train.py` of SalesforceAIResearch/DiffusionDPO.
    """

    section: ClassVar[str] = "data"

    path: str = field(metadata=MAY_CHANGE)
    """A file, a folder, a glob pattern, the id of a data set on the Hugging Face hub, or the
    address of parquet files in an object store (`s3://bucket/folder`, `gs://`,
    `hf://datasets/...`), which takes `streaming: true`."""
    resolution: int
    """Side of a square image after the crop, pixels; with `buckets`, the root of the area. DPO
    takes 512 for SD 1.5 and 1024 for SDXL."""
    kind: str = "auto"
    """The reader: pickapic, parquet, webdataset, jsonl, folder or a module of your own; `auto`
    recognises it by files and columns, and says what it chose."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are none that a reader knows. Keys: `prompt`, and either
    `chosen` and `rejected`, or `first` and `second` with `first_score` and `second_score`, or
    `chosen` alone; for several images a row `images` and `scores`, each a column of lists or the
    names of several columns with commas between."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose file names carry one."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    streaming: bool = False
    """Read in order with little memory and no local copy, instead of at random. Shuffles within
    blocks of `shuffle_block` rows only. Every rank reads its own row groups or shards. Tar shards
    are always streamed."""
    shuffle_block: Annotated[int, AtLeast(1)] = 512
    """Rows that a stream shuffles at once, shared by the up to 32 lanes that it is read in, of each
    of which at least 16 rows. Up to three times as many are held over all ranks, encoded: 512 rows
    of Pick-a-Pic are about 180 MB."""
    labels: Literal["by_name", "higher_is_better", "lower_is_better"] = "by_name"
    """Meaning of the numbers of the images. `by_name`: of columns named as ranks (`rank`,
    `rank_a`, ...) the smaller number is the better one, of all others the larger; the line on the
    data set says which. A data set of distances needs `lower_is_better`."""
    group_pairs: Literal["all", "fronts"] = "all"
    """Which pairs a row of several images makes: every two of them, or each image that no other
    one beats in all numbers of `strength.target` with each that beats none (CaPO's Pareto
    fronts)."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs of which neither side is preferred: left out, or seen as half a preference for each
    side, by objectives that read how sure a pair is."""
    weighting: Literal["uniform", "per_prompt"] = "uniform"
    """`per_prompt` lets each prompt count as much as any other, by the number of its pairs that
    Pick-a-Pic's num_example_per_prompt says; for objectives that weigh pairs."""
    strength: StrengthConfig = field(default_factory=StrengthConfig)
    """How sure each preference is, and how much it counts, from votes or scores. By default every
    pair is as its label has it."""
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    """Files of scores of the images, and what they decide: filters, order, prompts, and through
    `strength` how sure each preference is."""
    annotators: str | None = None
    """Where each row is the verdict of one of several annotators: two columns with a comma between
    that say what the first and the second image are, such as `image_0_uid, image_1_uid`. Rows with
    the same prompt and the same two images are then one pair, whose labels add up as votes. Null
    takes every row as a pair."""
    users: str | None = None
    """A column that says who gave each verdict, such as Pick-a-Pic's `user_id`, for reward models
    that tell tastes apart (`model.head.kind: pal`). Null asks for none."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Use only the first so many pairs. A stream is then read in one lane, by every rank."""
    holdout: float | None = None
    """Share of the prompts whose pairs are never trained on, but evaluated while the run trains
    (section `evaluation`). A digest of the prompt decides, so that it is the same for every run;
    null trains on all."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image stays when its shape does not fit (DPO: center). Both sides of a pair
    are cut at the same relative place."""
    crops: Annotated[int, AtLeast(1)] | None = None
    """With `crop: random`, at how many places each pair is cut, spread over the image, one of them
    at each visit; null for anywhere. Encodings in advance (`model.encoders: cached`) need a number,
    and take as many times the room."""
    flip: bool = True
    """Mirror a pair with probability one half (DPO). Turn it off where captions say left, right,
    or anything that a mirror makes wrong."""
    buckets: bool = False
    """Keep wide images wide: each batch has one of several shapes of about the same area, sides
    between half and twice `resolution` (SDXL, arXiv:2307.01952, appendix I)."""
    caption_dropout: Annotated[float, Between(0, 1)] = 0.2
    """Probability that a pair is seen without its caption (DPO), which keeps classifier-free
    guidance trained. Both sides lose it together."""
    visits: Annotated[int, AtLeast(1)] | None = None
    """How many visits of a pair differ in what is random about them (time, noise, flip, crop, lost
    caption, the posterior's sample): visit v shows what visit v modulo this showed. The times of a
    pair are then one in each of so many equally probable parts of their distribution. Null: new at
    every visit. `reference: cached` needs a number, and takes 8 bytes a pair and visit."""
    reuse_visits: bool = field(default=False, metadata=MAY_CHANGE)
    """Whether a run with `reference: cached` may see a pair more often than `visits` says, under
    noise that it has seen the pair with before; false refuses such a run."""
    max_bad_fraction: Annotated[float, Between(0, 1)] = field(default=0.01, metadata=MAY_CHANGE)
    """The run stops when more than this share of the pairs cannot be used. Streams, which do not
    know how many they will have, compare with the pairs seen, at least 1000."""
    max_pixels: Annotated[int, AtLeast(1)] = MAX_PIXELS
    """Larger images are skipped unread, as decompression bombs (Pillow's threshold for a warning;
    its own refusal at twice this value stays)."""
    workers: Annotated[int, AtLeast(0)] = field(default=2, metadata=MAY_CHANGE)
    """Processes that decode, on each rank; 0 decodes in the training process."""

    @property
    def lower_is_better(self) -> bool | None:
        """Whether the smaller number wins; None where the names of the columns say it."""
        return None if self.labels == "by_name" else self.labels == "lower_is_better"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(
                f"resolution must be a multiple of 8, the factor of the autoencoders, "
                f"got {self.resolution}"
            )
        if self.crops is not None and self.crop != "random":
            raise ValueError(
                f"crops is {self.crops}, a number of places for random crops, and crop is "
                f"{self.crop}: set crop to random, or crops to null"
            )
        if self.users is not None and self.annotators is not None:
            raise ValueError(
                f"users tells apart who gave each verdict ({self.users}), and annotators adds up "
                f"the verdicts of all: leave one of them out"
            )
        self._check_scores()
        check_share(self.holdout)
        if self.holdout is not None and self.streaming:
            raise ValueError(
                "holdout needs all prompts in advance, which a stream does not know: set streaming "
                "to false or holdout to null"
            )
        if self.buckets and self.streaming:
            raise ValueError(
                "buckets need every image's size in advance, which a stream does not have: "
                "set streaming or buckets to false"
            )

    def _check_scores(self) -> None:
        """Raise ValueError for scores that are read and not named, or against what they decide."""
        for key, names in self.strength.read_by().items():
            for name in names:
                if name.startswith(SCORES):
                    self.scores.check_name(name.removeprefix(SCORES), f"strength.{key}")
        tag = self.scores.tag
        if tag is not None and tag.tells == "goal" and (self.strength.asked or self.ties == "keep"):
            asked = next(iter(self.strength.asked.values()), "ties is keep")
            raise ValueError(
                f"scores.tag tells goals, by which either side is the chosen one in turn, and "
                f"{asked}, which is about the sides as they are labelled: leave it at its default, "
                f"or set scores.tag.tells to own"
            )
        rule, preference = self.scores.filter, self.strength.preference
        if rule is None or rule.flip_below is None or preference.is_certain:
            return
        if not all(name.startswith(SCORES) for name in preference.reads):
            raise ValueError(
                f"scores.filter.flip_below turns pairs round that are labelled wrong, and "
                f"strength.preference reads {', '.join(preference.reads)}, by which they would "
                f"count as before: let it read a score (of: scores.{rule.by}), or drop such pairs "
                f"with drop_below"
            )
