"""What a denoiser is told next to the noisy latent and the time."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.devices import on_device, send


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How n images were cut from their files, in pixels."""

    original_sizes: Tensor
    """Int64 [n, 2], (height, width) of the file."""
    crop_corners: Tensor
    """Int64 [n, 2], (top, left) of the crop in the resized image."""
    target_size: tuple[int, int]
    """(height, width) of the images that the network sees."""


@dataclass(frozen=True, kw_only=True)
class PromptEmbeddings:
    """n encoded prompts."""

    hidden_states: Tensor
    """One vector per token, shape [n, tokens, width]."""
    pooled: Tensor | None = None
    """One vector per prompt, shape [n, pooled width], for backbones that take one."""

    def rows(self, index: Tensor) -> PromptEmbeddings:
        """The prompts at `index`, an int64 tensor [m] on the same device; repeats are fine."""
        return PromptEmbeddings(
            hidden_states=self.hidden_states[index],
            pooled=None if self.pooled is None else self.pooled[index],
        )

    def to(self, device: torch.device) -> PromptEmbeddings:
        """The same on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return PromptEmbeddings(hidden_states=self.hidden_states.to(device), pooled=pooled)


class AbstractConditioner(abc.ABC):
    """The text encoders of a backbone and the form in which its network wants to hear of them."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The text encoders, which `model.encoders` may keep in host memory."""
        return ()

    @abc.abstractmethod
    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Encode n prompts, each anew, as the backbone's own pipeline would.

        A dropped caption is the empty prompt, encoded like any other.
        """

    @abc.abstractmethod
    def unconditional(self) -> PromptEmbeddings:
        """The one row that guidance steers away from, as in the backbone's own pipeline."""

    @abc.abstractmethod
    def arguments(self, embeddings: PromptEmbeddings, framing: Framing) -> Mapping[str, Any]:
        """Keyword arguments of the network's forward next to latent and time; rows match."""


def conditioning_rows(arguments: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Keyword arguments of the network for some of its rows, at `index`, int64 [m]."""
    return {
        name: conditioning_rows(value, index) if isinstance(value, Mapping) else value[index]
        for name, value in arguments.items()
    }


def stack_embeddings(rows: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Several encodings below one another, in the given order; they are of one backbone."""
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return PromptEmbeddings(
        hidden_states=torch.cat([row.hidden_states for row in rows]),
        pooled=torch.cat(pooled) if pooled else None,
    )


class PromptEncoder:
    """Prompts as a network hears of them: around frozen text encoders, never autocast.

    For guidance, every prompt is encoded alone and the most recently used ones are kept on the
    device, so that a row does not depend on the company that its prompt was first met in, not even
    in the last bit.
    """

    def __init__(
        self, conditioner: AbstractConditioner, *, device: torch.device, capacity: int = 256
    ) -> None:
        """Start with nothing kept.

        Args:
            conditioner: around the text encoders.
            device: where these compute; they may lie in host memory.
            capacity: prompts that are kept; one of SDXL takes 0.6 MB in float32.
        """
        self.conditioner = conditioner
        self._device = device
        self._capacity = capacity
        self._kept: OrderedDict[str, PromptEmbeddings] = OrderedDict()
        self._unconditional: PromptEmbeddings | None = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Encode n prompts, equal ones once; the empty prompt represents a dropped caption."""
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        embeddings = self._run(lambda: self.conditioner.encode(distinct))
        return embeddings.rows(send(index, self._device))

    def framed(self, prompts: Sequence[str], framing: Framing) -> Mapping[str, Any]:
        """What the network is told of n images next to latent and time, as they were cut."""
        return self.conditioner.arguments(self.encode(prompts), framing)

    @torch.no_grad()
    def guided(
        self,
        prompts: Sequence[str],
        *,
        guidance: float,
        size: tuple[int, int],
        negative_prompt: str | None = None,
    ) -> Mapping[str, Any]:
        """What the network is told of n images that are to be sampled.

        Args:
            prompts: n of them.
            guidance: above 1 there are 2 n rows, the first n of them unconditional, as in the
                backbone's own pipeline.
            size: (height, width) of the images in pixels, told as that of the uncropped file.
            negative_prompt: in the place of what guidance steers away from.
        """
        # What is kept must serve training too: none of it may be an inference tensor.
        with torch.inference_mode(mode=False):
            rows = [self._alone(prompt) for prompt in prompts]
            if guidance > 1:
                rows = [self._away(negative_prompt)] * len(prompts) + rows
        framing = Framing(
            original_sizes=torch.tensor([size] * len(rows)),
            crop_corners=torch.zeros((len(rows), 2), dtype=torch.int64),
            target_size=size,
        )
        return self.conditioner.arguments(stack_embeddings(rows), framing)

    def _run(self, encode: Callable[[], PromptEmbeddings]) -> PromptEmbeddings:
        networks, device = self.conditioner.networks, self._device
        with on_device(networks, device), torch.autocast(device.type, enabled=False):
            return encode().to(device)

    def _alone(self, prompt: str) -> PromptEmbeddings:
        if prompt not in self._kept:
            self._kept[prompt] = self._run(lambda: self.conditioner.encode([prompt]))
        self._kept.move_to_end(prompt)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return self._kept[prompt]

    def _away(self, negative_prompt: str | None) -> PromptEmbeddings:
        if negative_prompt is not None:
            return self._alone(negative_prompt)
        if self._unconditional is None:
            self._unconditional = self._run(self.conditioner.unconditional)
        return self._unconditional


def token_ids(
    tokenizer: Any, prompts: Sequence[str], device: torch.device, *, tokens: int | None = None
) -> Tensor:
    """Prompts cut and padded to one length, int64 [n, tokens].

    Args:
        tokenizer: of transformers.
        prompts: n of them.
        device: where the result goes.
        tokens: the length; None is the tokenizer's own.
    """
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length if tokens is None else tokens,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return send(ids, device)


@dataclass(frozen=True, kw_only=True)
class CutPrompts:
    """Which of some prompts are longer than their tokenizers read."""

    seen: int
    cut: tuple[str, ...]
    """The prompts whose ends are ignored, the longest first."""
    longest: int
    """Tokens of the longest prompt, the marks of its start and end included."""
    limit: int
    """Tokens that are read."""

    def describe(self) -> str:
        """For example `3 of 1,000 captions are longer than the 77 tokens ...`."""
        if not self.cut:
            return (
                f"none of {self.seen:,} captions is cut: the longest has {self.longest} of "
                f"{self.limit} tokens"
            )
        many = "s are" if len(self.cut) > 1 else " is"
        start = self.cut[0][:60]
        return (
            f"{len(self.cut):,} of {self.seen:,} captions: the end{many} cut, as the text encoder "
            f"reads {self.limit} tokens and the longest has {self.longest} ({start!r}...)"
        )


def cut_prompts(tokenizers: Sequence[Any], prompts: Iterable[str]) -> CutPrompts:
    """Count prompts that one of the tokenizers cuts.

    Args:
        tokenizers: at least one; each knows its `model_max_length`.
        prompts: each counts once.
    """
    distinct = list(dict.fromkeys(prompts))
    limit = min(int(tokenizer.model_max_length) for tokenizer in tokenizers)
    lengths = {
        prompt: max(len(ids) for ids in found)
        for prompt, *found in zip(
            distinct, *(_untruncated(each, distinct) for each in tokenizers), strict=True
        )
    }
    cut = sorted((p for p in distinct if lengths[p] > limit), key=lambda p: -lengths[p])
    return CutPrompts(
        seen=len(distinct), cut=tuple(cut), longest=max(lengths.values(), default=0), limit=limit
    )


def _untruncated(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    if not prompts:
        return []
    found: list[list[int]] = tokenizer(prompts, truncation=False, verbose=False).input_ids
    return found
