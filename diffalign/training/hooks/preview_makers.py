"""What makes previews: images of prompts, or responses to questions, by the policy in training."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from PIL import Image

from diffalign.data.decoding import BadImageError, decode
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.errors import DataError
from diffalign.generation.text_to_image import SamplerConfig, TextToImage
from diffalign.imaging.grid import evenly_spaced
from diffalign.imaging.image_files import to_images
from diffalign.models.diffusion.sampling import Samplable
from diffalign.training.hooks.base import TrainingRun

_LOOKED_AT = 1000
"""Captions among which those of the previews are taken."""


@dataclass(frozen=True, kw_only=True)
class PreviewItem:
    """What one row of previews is of."""

    caption: str
    """The prompt or question, for people."""
    turns: tuple[Turn, ...] = ()
    """The conversation that a response belongs to; empty for images."""
    images: tuple[Image.Image, ...] = ()
    """What the conversation is about."""


class AbstractMaker(abc.ABC):
    """Makes previews of one kind of model."""

    @abc.abstractmethod
    def previewed(self, run: TrainingRun) -> list[PreviewItem]:
        """What is previewed, the same whenever a run is started; none where nothing is known.

        Raises:
            DataError: the image of a question cannot be read.
        """

    @abc.abstractmethod
    def make(
        self, run: TrainingRun, previewed: Sequence[PreviewItem]
    ) -> Sequence[Image.Image | str]:
        """One preview for each item, of the policy as it is; within `inspecting`."""


class SchedulesSampling(Protocol):
    """Settings of a model that makes images, as far as sampling needs them."""

    def scheduler(self, name: str | None = None) -> Any:
        """A scheduler of diffusers; None is the model's own."""

    def schedule_arguments(self, latent_shape: tuple[int, int, int]) -> Mapping[str, Any]:
        """What its `set_timesteps` is given besides."""


class ImageMaker(AbstractMaker):
    """Images, each from the same noise at every step."""

    def __init__(
        self,
        settings: SchedulesSampling,
        *,
        prompts: Sequence[str],
        count: int,
        seed: int,
        sampler: SamplerConfig,
    ) -> None:
        """Args:
        settings: of the model.
        prompts: none takes captions of the data.
        count: how many of those.
        seed: see `PreviewsConfig`.
        sampler: how images are sampled.
        """
        self._settings, self._prompts, self._count = settings, prompts, count
        self._seed, self._sampler = seed, sampler

    def previewed(self, run: TrainingRun) -> list[PreviewItem]:
        captions = self._prompts or evenly_spaced(
            list(dict.fromkeys(run.source.captions(_LOOKED_AT))), self._count
        )
        return [PreviewItem(caption=caption) for caption in captions]

    def make(self, run: TrainingRun, previewed: Sequence[PreviewItem]) -> Sequence[Image.Image]:
        model = cast(Samplable, run.model)
        shape = model.latent_space.shape(self._sampler.size_for(model.latent_space))
        text_to_image = TextToImage(
            model,
            self._settings.scheduler(),
            self._sampler,
            self._settings.schedule_arguments(shape),
        )
        images = [
            text_to_image.generate([item.caption], [self._seed])[0] for item in previewed
        ]  # one at a time: a preview costs no more memory than it must
        return [image for made in images for image in to_images(made.nan_to_num()[None])]


class WritesResponses(Protocol):
    """A loaded model that writes responses."""

    processor: Any
    """Of transformers, with a chat template."""

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy responses to conversations that the chat template wrote."""


class ResponseMaker(AbstractMaker):
    """Responses of the most probable tokens."""

    def __init__(
        self, *, questions: Sequence[tuple[str, Any]], count: int, max_new_tokens: int
    ) -> None:
        """Args:
        questions: text, and path of an image or None; none takes conversations of the data.
        count: how many of those.
        max_new_tokens: a response ends there at the latest.
        """
        self._questions, self._count = questions, count
        self._max_new_tokens = max_new_tokens

    def previewed(self, run: TrainingRun) -> list[PreviewItem]:
        if self._questions:
            return [_asked(text, path) for text, path in self._questions]
        return [
            PreviewItem(
                caption=turns[-1].text.replace(IMAGE, " ").strip(),
                turns=tuple(turns),
                images=tuple(images),
            )
            for turns, images in run.source.conversations(self._count)
        ]

    def make(self, run: TrainingRun, previewed: Sequence[PreviewItem]) -> Sequence[str]:
        model = cast(WritesResponses, run.model)
        encoder = ChatEncoder(model.processor)
        return [
            model.generate(
                [encoder.prompt(item.turns, item.images).text],
                [list(item.images)],
                max_new_tokens=self._max_new_tokens,
            )[0]
            for item in previewed
        ]


def _asked(text: str, path: Any) -> PreviewItem:
    try:
        images = () if path is None else (decode(path),)
    except BadImageError as error:
        raise DataError(
            f"previews.questions: {path}: cannot be read as an image: {error.reason.value}: "
            f"{error.detail}"
        ) from error
    asked = f"{IMAGE}\n{text}" if images else text
    return PreviewItem(caption=text, turns=(Turn(role="user", text=asked),), images=images)
