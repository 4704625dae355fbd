"""Conversations about images to tokens, by a model's own processor and chat template.

Prompt and response are tokenised together: apart, a space at their border becomes another token.
The text between them, and what ends a response, are learned from the chat template by a probe.
Nothing is ever cut off: a prompt without its end, or an image without some of its tokens, is
another sample, and a response without its end teaches the model never to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.responses.conversation import without_end_tokens
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.responses.template import WHOLE_TEXT, ChatTemplate
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.errors import ModelError

SMALLEST_SIDE = 2
"""Pixels that each side of an image must have: a line of pixels is a placeholder or a fault, and
some processors of transformers take it for a colour channel."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A conversation up to the place where the response starts: what a model generates from."""

    input_ids: Tensor
    """Int64 [P]; every image's tokens are where it is."""
    further: Mapping[str, Tensor]
    """Further outputs of the processor per token, such as `mm_token_type_ids`; [P] each."""
    image_inputs: Mapping[str, Tensor]
    """Its outputs for the images, such as `pixel_values` and `image_grid_thw`; empty if there is
    none."""
    text: str
    """As the chat template rendered it, with one marker an image."""
    markers: tuple[int, int]
    """Tokens up to and with the last image: with one token an image, and with all of them."""


@dataclass(frozen=True, kw_only=True)
class EncodedResponse:
    """A conversation with a response: N of its L tokens are the response and what ends it."""

    input_ids: Tensor
    """Int64 [L]; the response comes last."""
    start: int
    """Where it starts: L - N."""
    offsets: Tensor
    """Int64 [N, 2]: first character of each of its tokens, and the character after the last one;
    characters are those of the response in the data set. Empty for the end-of-sequence token,
    which is the last one."""
    further: Mapping[str, Tensor]
    """As for a prompt; [L] each."""

    @property
    def tokens(self) -> Tensor:
        """Tokens of the response and the end of the sequence, int64 [N]."""
        return self.input_ids[self.start :]

    @property
    def response_mask(self) -> Tensor:
        """Bool [L], True for those."""
        mask = torch.zeros(len(self.input_ids), dtype=torch.bool)
        mask[self.start :] = True
        return mask


@dataclass(frozen=True)
class _Tokens:
    """A text, tokenised with one token an image."""

    ids: list[int]
    ends: list[int]
    """The character after the last one of each token; 0 for tokens that are not in the text."""
    starts: list[int]


class ChatEncoder:
    """Turns conversations into what a vision-language model takes.

    It knows processors of transformers and no models: what a processor lacks to count image tokens
    is to be given to it before.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        """Learn the chat template.

        Args:
            processor: of transformers, with a fast tokenizer, an image processor and a template.
            max_length: most tokens of a conversation with its response, images included; None
                allows any number.

        Raises:
            ModelError: the processor has no chat template, lacks what it needs to count image
                tokens, or its template cannot be followed.
        """
        self.processor = processor
        self.max_length = max_length
        self._tokenizer = processor.tokenizer
        _check_processor(processor)
        self._template = ChatTemplate(processor)

    @property
    def pad_token_id(self) -> int:
        """The token that rows are padded with; hidden by the attention mask."""
        own = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if own is None else own)

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedPrompt:
        """A conversation up to where the response starts.

        Args:
            turns: the last one is the user's.
            images: RGB, in reading order; as many as there are markers.

        Raises:
            UnusableRowError: markers and images differ in number.
        """
        marked = sum(turn.text.count(IMAGE) for turn in turns)
        if marked != len(images):
            raise UnusableRowError(
                SkipReason.MARKERS,
                f"the turns have {marked} {IMAGE} markers, and there are {len(images)} images",
            )
        text = self._template.render(turns, generation=True)
        plain = self._tokenize(text)
        if plain.ids.count(self._marker_id) != len(images):
            raise UnusableRowError(
                SkipReason.MARKERS,
                f"the text of a turn contains {self._template.marker}, which represents an image",
            )
        ids, further, image_inputs = self._process(text, images)
        marked_until = _after_last(plain.ids, self._marker_id)
        rest = plain.ids[marked_until:]
        expanded_until = len(ids) - len(rest)
        counted = "image_grid_thw" in image_inputs  # by Qwen's itself: one token for a small image
        self._check_expansion(
            ids, rest, image_count=0 if counted else len(images), unexpanded=len(plain.ids)
        )
        return EncodedPrompt(
            input_ids=torch.tensor(ids),
            further=further,
            image_inputs=image_inputs,
            text=text,
            markers=(marked_until, expanded_until),
        )

    def image_inputs(
        self, prompt: EncodedPrompt, images: Sequence[Image.Image]
    ) -> Mapping[str, Tensor]:
        """Outputs of the processor for other images in place of those of a prompt.

        Args:
            prompt: of `prompt`.
            images: RGB, as many and of the same sizes.

        Raises:
            ValueError: their image tokens are not as many.
        """
        ids, _, image_inputs = self._process(prompt.text, images)
        if ids != prompt.input_ids.tolist():
            raise ValueError(
                f"other images change the number of tokens from {len(prompt.input_ids)} to "
                f"{len(ids)}: they must have the sizes of those that they replace"
            )
        return image_inputs

    def response(self, prompt: EncodedPrompt, response: str) -> EncodedResponse:
        """The conversation with one response to it, and the end of the sequence.

        Args:
            prompt: of `prompt`.
            response: white space at its ends is not trained on, and tokens that end it already are
                not trained on twice.

        Raises:
            UnusableRowError: the response is empty, contains a marker of images or a token that
                ends it, or makes the row longer than `max_length`.
        """
        kept = self._without_end(response).strip()
        if not kept:
            raise UnusableRowError(SkipReason.EMPTY_RESPONSE, repr(response))
        text = prompt.text + self._template.frame.before + kept + self._template.frame.end
        plain = self._tokenize(text)
        images_until, expanded_until = prompt.markers
        if self._marker_id in plain.ids[images_until:]:
            raise UnusableRowError(
                SkipReason.MARKERS,
                f"it contains {self._template.marker}, which represents an image",
            )
        stop = plain.ends.index(len(text)) + 1  # what a tokenizer adds by itself comes after it
        first = next(i for i, end in enumerate(plain.ends) if end > len(prompt.text))
        inside = self._end_ids.intersection(plain.ids[first : stop - 1])
        if inside:
            token = self._tokenizer.convert_ids_to_tokens(min(inside))
            raise UnusableRowError(
                SkipReason.END_INSIDE, f"{token} ends a response, and is within this one"
            )
        length = expanded_until + stop - images_until
        if self.max_length is not None and length > self.max_length:
            raise UnusableRowError(
                SkipReason.TOO_LONG,
                f"{length} tokens, {expanded_until - images_until} of them because of images; "
                f"allowed are {self.max_length}",
            )
        own = prompt.input_ids[:expanded_until]
        shift = (
            len(response) - len(response.lstrip()) - len(prompt.text + self._template.frame.before)
        )
        offsets = torch.tensor([plain.starts[first:stop], plain.ends[first:stop]]).T + shift
        return EncodedResponse(
            input_ids=torch.cat([own, torch.tensor(plain.ids[images_until:stop])]),
            start=length - (stop - first),
            offsets=offsets.clamp(0, len(response) - len(response.lstrip()) + len(kept)),
            further={
                name: torch.cat([values[:expanded_until], _as_text(values, length - len(own))])
                for name, values in prompt.further.items()
            },
        )

    def sampled(self, prompt: EncodedPrompt, tokens: Tensor) -> EncodedResponse:
        """The conversation with the very tokens that a model wrote, whatever their text is.

        Args:
            prompt: of `prompt`.
            tokens: int64 [N], at least one; the end of the sequence is the last, where it was
                written.
        """
        return EncodedResponse(
            input_ids=torch.cat([prompt.input_ids, tokens]),
            start=len(prompt.input_ids),
            offsets=torch.zeros((len(tokens), 2), dtype=torch.int64),
            further={
                name: torch.cat([values, _as_text(values, len(tokens))])
                for name, values in prompt.further.items()
            },
        )

    def _without_end(self, response: str) -> str:
        """A response without the tokens that end one."""
        ends = [str(self._tokenizer.convert_ids_to_tokens(i)) for i in self._end_ids]
        text = without_end_tokens(response)
        while text.rstrip().endswith(tuple(ends)):
            text = text.rstrip()
            text = without_end_tokens(text[: -max(len(e) for e in ends if text.endswith(e))])
        return text

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """Tokens that end a response: the template's, and the tokenizer's end of a sequence."""
        own = self._tokenizer(self._template.frame.end, add_special_tokens=False, **WHOLE_TEXT)[
            "input_ids"
        ]
        return frozenset({own[-1], self._tokenizer.eos_token_id} - {None})

    @property
    def _marker_id(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(self._template.marker))

    def _process(
        self, text: str, images: Sequence[Image.Image]
    ) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        """Tokens, further outputs per token, and outputs for the images."""
        for image in images:
            if min(image.size) < SMALLEST_SIDE:
                raise UnusableRowError(
                    SkipReason.UNSUITABLE,
                    f"{image.width} x {image.height} pixels; each side must have {SMALLEST_SIDE}",
                )
        try:
            outputs = dict(
                self.processor(
                    text=[text],
                    images=list(images) or None,
                    return_tensors="pt",
                    add_special_tokens=self._adds_special_tokens(text),
                    **WHOLE_TEXT,
                )
            )
        except Exception as error:  # each processor has its own limits and its own errors
            if not images:
                raise
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise UnusableRowError(
                SkipReason.UNSUITABLE,
                f"{type(self.processor).__name__} takes no image of {sizes} pixels: "
                f"{type(error).__name__}: {error}",
            ) from error
        ids = outputs.pop("input_ids")
        outputs.pop("attention_mask", None)
        outputs.pop("labels", None)  # PaliGemma's of transformers 5, of a prompt alone
        strange = [name for name, value in outputs.items() if not isinstance(value, Tensor)]
        if strange:
            raise ModelError(
                f"{type(self.processor).__name__} gives {', '.join(strange)}, which are no tensors "
                f"and cannot be put into a batch"
            )
        further = {name: value[0] for name, value in outputs.items() if value.shape == ids.shape}
        image_inputs = {name: value for name, value in outputs.items() if name not in further}
        return ids[0].tolist(), further, image_inputs

    def _tokenize(self, text: str) -> _Tokens:
        encoded = self._tokenizer(
            text,
            add_special_tokens=self._adds_special_tokens(text),
            return_offsets_mapping=True,
            **WHOLE_TEXT,
        )
        starts, ends = zip(*encoded["offset_mapping"], strict=True)
        return _Tokens(list(encoded["input_ids"]), list(ends), list(starts))

    def _adds_special_tokens(self, text: str) -> bool:
        """Unless the template has written the first one already."""
        begin = self._tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    def _check_expansion(
        self, ids: list[int], rest: list[int], *, image_count: int, unexpanded: int
    ) -> None:
        """Raise ModelError unless the processor put tokens for images, and changed nothing else.

        Args:
            ids: what the processor gave.
            rest: tokens after the last image.
            image_count: how many there are.
            unexpanded: tokens of the text with one an image.
        """
        name = type(self.processor).__name__
        if rest and ids[-len(rest) :] != rest:
            raise ModelError(
                f"{name} changed the text after the last image; its responses cannot be marked"
            )
        if image_count and len(ids) <= unexpanded:
            raise ModelError(
                f"{name} gave {image_count} images no more than one token each. Settings for "
                f"counting image tokens, such as patch_size, are missing in its configuration"
            )


def _after_last(ids: list[int], marker: int) -> int:
    """Position after the last marker; 0 if there is none."""
    return max((position + 1 for position, i in enumerate(ids) if i == marker), default=0)


def _as_text(values: Tensor, count: int) -> Tensor:
    """Per-token outputs for text: what the last token of the prompt, which is text, has."""
    return values[-1:].expand(count)


def _check_processor(processor: Any) -> None:
    name = type(processor).__name__
    if not getattr(processor.tokenizer, "is_fast", False):
        raise ModelError(
            f"{name} has a slow tokenizer, which does not say where tokens come from. "
            f"Add the tokenizer.json of the fast one to the checkpoint"
        )
    for setting in ("patch_size", "vision_feature_select_strategy"):
        if getattr(processor, setting, "") is None:
            raise ModelError(
                f"{name} lacks {setting}, without which it cannot count image tokens; old "
                f"checkpoints do. Take it from the model's config.json"
            )
