"""Image pairs to batches: one visit of a pair decoded and cut to size, and samples stacked.

The worker stacks bytes, which the training process turns into numbers: bytes are a quarter of the
memory that processes share, which is scarce in containers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.data.batches import ImageBatch, ImageEncodings
from diffalign.data.decoding import Size
from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.encoded import EncodedPair, EncodedPrompt, decoded_view
from diffalign.data.pairs.transforms import CENTER, Cut, CutImage, cut, numbered_place
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.data.strength.base import NOTHING_ASKED, Strength, stack_strengths
from diffalign.seeding import derive_seed, unit_interval
from diffalign.timesteps import TimestepSampling


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of an ImageBatch before collation."""

    sample_id: str
    prompt: str
    """After caption dropout."""
    caption: str
    """Before it."""
    images: Mapping[str, CutImage]
    """View -> the image, cut to size, or its encoding where there are `embeddings`."""
    target: Size
    """(height, width) that it was cut to."""
    timestep: float
    noise_seed: int
    encoding_seeds: Mapping[str, int]
    """View -> seed."""
    visit: int
    """Which of the visits that differ it shows."""
    strength: Strength = NOTHING_ASKED
    """See `ImagePair`."""
    embeddings: EncodedPrompt | None = None
    """Of the prompt, where images and prompts were encoded in advance."""
    own_prompts: Mapping[str, str] = field(default_factory=dict)
    """View -> its prompt after caption dropout, where each has its own."""
    user: str | None = None
    """See `ImagePair`."""


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """Turns a pair and the number of a visit into a sample; the same one on any rank and worker."""

    config: PairConfig
    views: tuple[str, ...]
    """Sides that are decoded: `chosen`, `rejected` or both."""
    run_seed: int
    timesteps: TimestepSampling
    schedule_length: int
    """Length of the model's noise schedule."""

    def make(self, pair: ImagePair | EncodedPair, visit: int, target: Size) -> Sample | Skipped:
        """The sample of one visit, or why the pair cannot be used.

        Args:
            pair: with images still encoded as files, or as they were encoded by the model.
            visit: number of earlier visits of the pair; taken modulo `data.visits`.
            target: (height, width) of both sides.
        """
        if self.config.visits is not None:
            visit %= self.config.visits
        sample_id, tag = pair.sample_id, self.config.scores.tag
        how, dropped = self._cut(sample_id, visit, target), self._drops_caption(sample_id, visit)
        tells_goal = tag is not None and tag.tells == "goal" and not dropped
        if tells_goal and isinstance(pair, ImagePair):
            pair = _with_goal(pair, visit)
        images = {}
        for view in self.views:
            image = self._image(pair, view, how)
            if isinstance(image, Skipped):
                return image
            images[view] = image
        embeddings = None if isinstance(pair, ImagePair) else pair.embeddings(dropped=dropped)
        if isinstance(embeddings, Skipped):
            return embeddings
        return Sample(
            sample_id=sample_id,
            prompt="" if dropped else pair.prompt,
            caption=pair.prompt,
            images=images,
            target=target,
            embeddings=embeddings,
            timestep=self.timesteps.sample(
                self.run_seed,
                sample_id,
                visit,
                schedule_length=self.schedule_length,
                visits=self.config.visits,
                size=target,
            ),
            noise_seed=derive_seed(self.run_seed, sample_id, visit, "noise"),
            encoding_seeds={
                view: derive_seed(self.run_seed, sample_id, visit, "encoding", view)
                for view in self.views
            },
            visit=visit,
            strength=pair.strength,
            own_prompts=self._own_prompts(pair, dropped=dropped),
            user=pair.user if isinstance(pair, ImagePair) else None,
        )

    def _own_prompts(self, pair: ImagePair | EncodedPair, *, dropped: bool) -> dict[str, str]:
        if not isinstance(pair, ImagePair) or not pair.own_prompts:
            return {}
        return {view: "" if dropped else pair.own_prompts[view] for view in self.views}

    def _image(self, pair: ImagePair | EncodedPair, view: str, how: Cut) -> CutImage | Skipped:
        if not isinstance(pair, ImagePair):
            return pair.image(view, (how.number, how.mirrored))
        image = decoded_view(pair, view, max_pixels=self.config.max_pixels)
        return image if isinstance(image, Skipped) else cut(image, how)

    def _drops_caption(self, sample_id: str, visit: int) -> bool:
        coin = unit_interval(self.run_seed, sample_id, visit, "caption")
        return coin < self.config.caption_dropout

    def _cut(self, sample_id: str, visit: int, target: Size) -> Cut:
        def coin(name: str) -> float:
            return unit_interval(self.run_seed, sample_id, visit, name)

        config, number, place = self.config, CENTER, None
        if config.crop == "random" and config.crops is None:
            place = coin("top"), coin("left")
        elif config.crops is not None:
            number = min(int(coin("place") * config.crops), config.crops - 1)
            place = numbered_place(sample_id, number, of=config.crops)
        mirrored = config.flip and coin("flip") < 0.5
        return Cut(target=target, place=place, mirrored=mirrored, number=number)


def _with_goal(pair: ImagePair, visit: int) -> ImagePair:
    """The pair under the prompt of one of its sides, which is the chosen one of this visit: at
    every second visit the other, each time of half of all pairs."""
    own = pair.own_prompts
    if own["chosen"] == own["rejected"]:
        return pair
    turned = visit % 2 != int(unit_interval(pair.sample_id, "goal") < 0.5)
    if not turned:
        return dataclasses.replace(pair, own_prompts=dict.fromkeys(own, own["chosen"]))
    assert pair.rejected is not None, "it was checked when the data was opened"
    return dataclasses.replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        own_prompts=dict.fromkeys(own, own["rejected"]),
    )


def empty_caption(sample_id: str, caption: str) -> Skipped | None:
    """Why a pair cannot be used, if it has no caption. Needs no image."""
    if caption.strip():
        return None
    return Skipped(sample_id=sample_id, reason=SkipReason.EMPTY_CAPTION, detail=repr(caption))


def stack(samples: Sequence[Sample]) -> ImageBatch:
    """A batch of samples of one image size, whose images are still uint8 [B, 3, H, W]."""
    views = tuple(samples[0].images)
    images = {view: torch.stack([s.images[view].pixels for s in samples]) for view in views}
    encodings = _encodings(samples, images)
    return ImageBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        prompts=tuple(sample.prompt for sample in samples),
        captions=tuple(sample.caption for sample in samples),
        images=images if encodings is None else {},
        encodings=encodings,
        original_sizes={
            view: torch.tensor([s.images[view].original_size for s in samples]) for view in views
        },
        crop_corners={
            view: torch.tensor([s.images[view].corner for s in samples]) for view in views
        },
        timesteps=torch.tensor([sample.timestep for sample in samples], dtype=torch.float64),
        noise_seeds=tuple(sample.noise_seed for sample in samples),
        encoding_seeds={view: tuple(s.encoding_seeds[view] for s in samples) for view in views},
        visits=tuple(sample.visit for sample in samples),
        strength=stack_strengths([sample.strength for sample in samples]),
        own_prompts={
            view: tuple(sample.own_prompts[view] for sample in samples)
            for view in samples[0].own_prompts
        },
        users=tuple(sample.user for sample in samples if sample.user is not None),
    )


def _encodings(
    samples: Sequence[Sample], posteriors: Mapping[str, Tensor]
) -> ImageEncodings | None:
    """Of samples that were encoded in advance, equal prompts once."""
    embeddings = [sample.embeddings for sample in samples if sample.embeddings is not None]
    if not embeddings:
        return None
    distinct = {prompt.number: prompt.rows for prompt in embeddings}
    rows = {number: row for row, number in enumerate(distinct)}
    names = embeddings[0].rows
    return ImageEncodings(
        size=samples[0].target,
        posteriors=posteriors,
        prompts={name: torch.stack([each[name] for each in distinct.values()]) for name in names},
        prompt_rows=torch.tensor([rows[prompt.number] for prompt in embeddings]),
    )


def with_unit_range(batch: ImageBatch) -> ImageBatch:
    """The stacked batch with images as float32 in [-1, 1]."""
    return dataclasses.replace(
        batch, images={view: unit_range(pixels) for view, pixels in batch.images.items()}
    )


def unit_range(pixels: Tensor) -> Tensor:
    """Levels from 0 to 255 as float32 in [-1, 1]."""
    return torch.sub(pixels, 127.5).div_(127.5)
