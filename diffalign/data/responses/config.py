"""The `responses:` section of a config: preferences between responses, the twin of `data:`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from diffalign.config import MAY_CHANGE
from diffalign.data.held_out import check_share
from diffalign.data.responses.corruptions.base import AbstractCondition
from diffalign.data.responses.ranking import RankingConfig
from diffalign.data.responses.token_weights.base import AbstractTokenWeights
from diffalign.data.strength.settings import StrengthConfig
from diffalign.ranges import AtLeast, Between, Ranged


@dataclass(frozen=True, kw_only=True)
class ResponseConfig(Ranged):
    """Responses about images: where they lie, what they mean, and under which conditions and
    weights they can be seen."""

    section: ClassVar[str] = "responses"

    path: str = field(metadata=MAY_CHANGE)
    """A .parquet, .arrow, .jsonl or .json file, a folder or a glob pattern of them, or the id of a
    data set on the Hugging Face hub."""
    kind: str = "auto"
    """The form: trl, rlaif_v, rlhf_v, povid, vlfeedback, mdpo, opa_dpo, sharegpt, ms_swift,
    re_align, mask_dpo, mia_dpo, hsa_dpo, alpaca; unpaired or demonstrations for rows of one
    response; or a module of your own. `auto` recognises it by columns, and says what it chose."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not those of the form: the form's name for a column ->
    yours."""
    image_folder: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder that relative names of images start from; null for that of the file that names
    them."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose file names carry one."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    ties: Literal["drop", "keep"] = "drop"
    """Comparisons whose two scores are equal (VLFeedback): left out, or seen as half a preference
    for each response, by objectives that read how sure a pair is."""
    strength: StrengthConfig = field(default_factory=StrengthConfig)
    """How sure each preference is, and how much it counts, from votes or scores. By default every
    pair is as its label has it."""
    ranking: RankingConfig | None = None
    """Pairs left out, or put in order, by one number of each; null takes all of them in one random
    order."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Use only the first so many pairs."""
    holdout: float | None = None
    """Share of the images (of rows without one, of the conversations) whose pairs are never trained
    on, but evaluated while the run trains (section `evaluation`). A digest of the image decides, so
    that it is the same for every run; for it all images are read once, undecoded, when a run
    starts. Null trains on all."""
    max_length: Annotated[int, AtLeast(1)] = 2048
    """Tokens of a conversation with its response, those of the images included. A longer pair, or
    one beyond the model's context, is skipped and listed, never cut. 2048 is the setting of mDPO
    (arXiv:2406.11839, their scripts)."""
    pack_to: Annotated[int, AtLeast(1)] | None = field(default=None, metadata=MAY_CHANGE)
    """Put rows one after the other into sequences of up to so many tokens, which see themselves
    alone: without padding, at no more attention where all layers of a family see everything before
    a token (LLaVA, Qwen2.5-VL); elsewhere it grows with the square of the sequence
    (docs/performance.md). Null gives every row its own sequence, padded to the longest; so does a
    model that cannot keep rows apart, or `model.attention` other than sdpa, which is said."""
    conditions: dict[str, AbstractCondition] = field(default_factory=dict)
    """What is in place of the images in views such as `chosen@crop`, by name. Images that
    the data set itself gives are of kind `replaced`, under the name that its form gives them:
    `retrieved` (re_align) or `rejected` (ms_swift)."""
    visits: Annotated[int, AtLeast(1)] | None = None
    """How many samples of its random conditions a pair has: epoch e shows sample e modulo this.
    Null samples anew at every visit; `diffalign precompute` needs a number."""
    weights: dict[str, AbstractTokenWeights] = field(default_factory=dict)
    """How much each token counts in views such as `chosen:changed`, by name."""
    max_bad_fraction: Annotated[float, Between(0, 1)] = field(default=0.01, metadata=MAY_CHANGE)
    """The run stops when more than this share of the pairs cannot be used."""
    max_pixels: Annotated[int, AtLeast(1)] = 89_478_485
    """Larger images are skipped unread, as decompression bombs (Pillow's threshold for a warning;
    its own refusal at twice this value stays)."""
    workers: Annotated[int, AtLeast(0)] = field(default=2, metadata=MAY_CHANGE)
    """Processes that decode and tokenise, on each rank; 0 does so in the training process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.holdout)
