"""One pair of responses, tokenised, with the images under every condition that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.decoding import BadImageError, EncodedImage, Size, decode, size_or_reason
from diffalign.data.responses.chat import ChatEncoder, EncodedPrompt, EncodedResponse
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.data.responses.corruptions.tiles import to_tiles, with_tiles
from diffalign.data.responses.records import COMPETING, ResponsePair
from diffalign.data.skipping import Skipped, SkipReason, UnusableRowError
from diffalign.data.strength.base import NOTHING_ASKED, Strength
from diffalign.errors import ConfigError, did_you_mean
from diffalign.seeding import cpu_generator, derive_seed
from diffalign.views import View

AnotherImage = Callable[[str, int], EncodedImage]
"""An image of the training data, from the id of the sample that it is not of, and a seed."""


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """A row of a TokenBatch before collation."""

    sample_id: str
    visit: int
    """Which sample of its random conditions is shown."""
    views: frozenset[str]
    """As in the batch."""
    responses: Mapping[str, EncodedResponse]
    """Response -> its tokens after the conversation."""
    image_inputs: Mapping[str | None, Mapping[str, Tensor]]
    """Condition -> what the image processor gave; empty for text alone."""
    image_count: int
    weights: Mapping[str, Tensor]
    """`response:weights` -> float32 [L], 0 for the tokens of the prompt."""
    own_image_inputs: Mapping[tuple[str, str | None], Mapping[str, Tensor]] = field(
        default_factory=dict
    )
    """(Response, condition) -> the same for a response that is about other images than the rest."""
    paired: bool = True
    """Whether the responses compete; False where there is one."""
    strength: Strength = NOTHING_ASKED
    """See `ResponsePair`."""


@dataclass(frozen=True, kw_only=True)
class TokenSampleMaker:
    """Turns a pair and the number of a visit into a sample; the same one on any rank and worker."""

    config: ResponseConfig
    views: frozenset[str]
    """Names of the views that the objective asks for."""
    run_seed: int
    encoder: ChatEncoder
    another_image: AnotherImage | None = None
    """For conditions that take the image of another sample; None where the data set cannot be
    read at random."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a view that the config does not describe."""
        for name in sorted(self.views):
            view = View.parse(name)
            if view.condition:
                _require(name, view.condition, "conditions", self.config.conditions)
                self._check_origin(name, self.config.conditions[view.condition])
            if view.weights:
                _require(name, view.weights, "weights", self.config.weights)
                try:
                    self.config.weights[view.weights].reads(view.response)
                except ValueError as error:
                    raise ConfigError(f"the view {name}: {error}") from error

    def make(self, pair: ResponsePair, visit: int) -> TokenSample | Skipped:
        """The sample of one visit, or why the pair cannot be used.

        Args:
            pair: with images still encoded.
            visit: number of earlier visits of the pair; taken modulo `responses.visits`.
        """
        visits = self.config.visits
        try:
            return self._sample(pair, visit if visits is None else visit % visits)
        except UnusableRowError as error:
            return error.skipped(pair.sample_id)

    @cached_property
    def _parsed(self) -> tuple[View, ...]:
        return tuple(View.parse(name) for name in sorted(self.views))

    def _sample(self, pair: ResponsePair, visit: int) -> TokenSample:
        views = [view for view in self._parsed if pair.paired or view.response in pair.responses]
        images = [self._decoded(image) for image in pair.images]
        prompt = self.encoder.prompt(pair.turns, images)
        own = {name: self._own(pair, name) for name in pair.own if name in self._responses_read}
        encoded = {
            name: self._encoded(own[name][0] if name in own else prompt, pair, name)
            for name in sorted(self._responses_read)
            if pair.paired or name in pair.responses
        }
        if not own.keys() & COMPETING:
            _check_difference(encoded)
        return TokenSample(
            sample_id=pair.sample_id,
            visit=visit,
            views=self.views,
            responses={view.response: encoded[view.response] for view in views},
            image_inputs={
                condition: self._seen(condition, prompt, images, pair, visit)
                for condition in dict.fromkeys(view.condition for view in views)
            },
            own_image_inputs={
                (view.response, view.condition): self._seen(
                    view.condition, *own[view.response], pair, visit
                )
                for view in views
                if view.response in own and pair.own[view.response].images != pair.images
            },
            paired=pair.paired,
            strength=pair.strength,
            image_count=len(images),
            weights={
                f"{view.response}:{view.weights}": self._weights(view, encoded, pair)
                for view in views
                if view.weights
            },
        )

    def _own(self, pair: ResponsePair, name: str) -> tuple[EncodedPrompt, Sequence[Image.Image]]:
        """The prompt of a response that has a conversation or images of its own."""
        conversation = pair.own[name]
        images = [self._decoded(image, name) for image in conversation.images]
        try:
            return self.encoder.prompt(conversation.turns, images), images
        except UnusableRowError as error:
            raise UnusableRowError(error.reason, error.detail, name) from error

    @cached_property
    def _responses_read(self) -> frozenset[str]:
        """Responses of the views, and those that their weights are made from."""
        read = {view.response for view in self._parsed}
        for view in self._parsed:
            if view.weights:
                read |= self.config.weights[view.weights].reads(view.response)
        return frozenset(read)

    def _encoded(self, prompt: EncodedPrompt, pair: ResponsePair, name: str) -> EncodedResponse:
        if name not in pair.responses:
            raise UnusableRowError(
                SkipReason.MISSING_RESPONSE, f"the row has {', '.join(pair.responses)}", name
            )
        try:
            return self.encoder.response(prompt, pair.responses[name])
        except UnusableRowError as error:
            raise UnusableRowError(error.reason, error.detail, name) from error

    def _weights(
        self, view: View, encoded: Mapping[str, EncodedResponse], pair: ResponsePair
    ) -> Tensor:
        assert view.weights is not None
        own = encoded[view.response]
        weights = torch.zeros(len(own.input_ids))
        maker = self.config.weights[view.weights]
        weights[own.start :] = maker.weigh(view.response, encoded, pair.spans)
        if not weights.sum() > 0:  # also where they were divided by their sum
            raise UnusableRowError(
                SkipReason.NOTHING_COUNTS,
                f"all tokens of it count nothing under the weights {view.weights}",
                view.response,
            )
        return weights

    def _seen(
        self,
        name: str | None,
        prompt: EncodedPrompt,
        images: Sequence[Image.Image],
        pair: ResponsePair,
        visit: int,
    ) -> Mapping[str, Tensor]:
        """The processor's outputs for the images under a condition."""
        if name is None or not images:
            return prompt.image_inputs
        condition = self.config.conditions[name]
        seeds = [
            derive_seed(self.run_seed, pair.sample_id, visit, "condition", name, position)
            for position in range(len(images))
        ]
        generators = [cpu_generator(seed) for seed in seeds]
        starts = self._starts(condition, name, images, pair, seeds)
        shown = [condition.image(*each) for each in zip(starts, generators, strict=True)]
        image_inputs = prompt.image_inputs
        if any(new is not old for new, old in zip(shown, images, strict=True)):
            image_inputs = self.encoder.image_inputs(prompt, shown)
        if type(condition).pixels is AbstractCondition.pixels:
            return image_inputs
        image_processor = self.encoder.processor.image_processor
        tiles = to_tiles(image_inputs, image_processor)
        if len(tiles) > len(generators):  # crops of all images in one list: whose is not told
            tiles = [torch.cat(tiles)]
        # fewer stacks than images where a processor puts all of a row into one
        changed = [condition.pixels(*each) for each in zip(tiles, generators, strict=False)]
        return with_tiles(image_inputs, changed, image_processor)

    def _starts(
        self,
        condition: AbstractCondition,
        name: str,
        images: Sequence[Image.Image],
        pair: ResponsePair,
        seeds: Sequence[int],
    ) -> Sequence[Image.Image]:
        """The images that a condition starts from, in the sizes of the sample's own."""
        if condition.origin is Origin.OWN:
            return images
        if condition.origin is Origin.ROW:
            others = pair.other_images.get(name, ())
            if len(others) != len(images):
                raise UnusableRowError(
                    SkipReason.MISSING_IMAGE,
                    f"the row has {len(others)} images for the condition {name}, in place of "
                    f"{len(images)}",
                    name,
                )
        else:
            assert self.another_image is not None  # or __post_init__ would have refused
            others = tuple(self.another_image(pair.sample_id, seed) for seed in seeds)
        return [
            self._decoded(other, name).resize(own.size, Image.Resampling.BICUBIC)
            for other, own in zip(others, images, strict=True)
        ]

    def _decoded(self, image: EncodedImage, side: str | None = None) -> Image.Image:
        try:
            return decode(image, max_pixels=self.config.max_pixels)
        except BadImageError as error:
            raise UnusableRowError(error.reason, error.detail, side) from error

    def _check_origin(self, view: str, condition: AbstractCondition) -> None:
        if condition.origin is Origin.ANOTHER and self.another_image is None:
            raise ConfigError(
                f"the view {view} shows images of other samples, which this data set cannot be "
                f"read for at random"
            )


def _check_difference(encoded: Mapping[str, EncodedResponse]) -> None:
    """Raise UnusableRowError where chosen and rejected are the same tokens."""
    sides = [encoded[name].tokens for name in ("chosen", "rejected") if name in encoded]
    if len(sides) == 2 and torch.equal(*sides):
        raise UnusableRowError(SkipReason.IDENTICAL, "both are the same tokens")


def _require(view: str, name: str, section: str, given: Mapping[str, object]) -> None:
    """Raise ConfigError unless a section of the config describes what a view names."""
    if name in given:
        return
    known = ", ".join(given) or "none yet"
    raise ConfigError(
        f"the view {view} needs {name!r} under responses.{section} (there: {known})."
        f"{did_you_mean(name, given)} Add it, for example `{name}: {{kind: ...}}`"
    )


@dataclass(frozen=True, kw_only=True)
class ResponsePreviewRow:
    """One pair as the loader would see it."""

    sample_id: str
    prompt: str
    """The user's last turn, markers included; empty where the row cannot be read."""
    responses: Mapping[str, str]
    """Name -> response; empty likewise."""
    own: Mapping[str, str]
    """Name -> the user's last turn, and how many turns and images there are, of a response that
    belongs to another conversation or to other images."""
    images: tuple[Size | str, ...]
    """(height, width) of each, or why it cannot be used."""
    unusable: str | None
    """Why training will skip the pair; None if it will not."""


def preview_row(pair: ResponsePair | Skipped, maker: TokenSampleMaker) -> ResponsePreviewRow:
    """A pair, made into a sample as in training."""
    made = pair if isinstance(pair, Skipped) else maker.make(pair, 0)
    unusable = f"{made.reason.value}: {made.detail}" if isinstance(made, Skipped) else None
    if isinstance(pair, Skipped):
        return ResponsePreviewRow(
            sample_id=pair.sample_id, prompt="", responses={}, own={}, images=(), unusable=unusable
        )
    return ResponsePreviewRow(
        sample_id=pair.sample_id,
        prompt=pair.turns[-1].text,
        responses=pair.responses,
        own={
            name: f"{conversation.turns[-1].text} (its own: {len(conversation.turns)} turns, "
            f"{len(conversation.images)} images)"
            for name, conversation in pair.own.items()
        },
        images=tuple(size_or_reason(image, maker.config.max_pixels) for image in pair.images),
        unusable=unusable,
    )
