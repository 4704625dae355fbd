"""Keys and values of what several rows begin with, computed once and copied for each of them.

Positions go on after the prefix, wherever a family lets an image end: the first one after it is the
largest of the prefix, along any axis, and one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from diffalign.models.vlm.quirks.base import FULL, family_of

_ROOM = 64
"""Tokens by which the memory of rows grows, so that they are not moved for every token."""

_GREEDY = {
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "min_length": (0, None),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "num_beams": (1, None),
    "stop_strings": (None,),
    "watermarking_config": (None,),
}
"""Settings of a checkpoint that would change greedy responses, and their values that do not."""


def cache_obstacle(model: Any) -> str | None:
    """Why keys and values of a prefix cannot be copied for what follows; None where they can.

    Args:
        model: of transformers, for image-text-to-text generation.
    """
    config: PretrainedConfig = model.config
    text = config.get_text_config()
    family = family_of(config)
    if others := sorted(set(family.kinds) - {FULL}):
        return f"its layers of the kind {', '.join(others)} do not look at all that stands before"
    if family.window is not None and not family.kinds:
        return f"its layers attend within a window of {family.window} tokens"
    if getattr(text, "cross_attention_layers", None):
        return "its layers look at images by a mask of their own"
    takes = inspect.signature(type(model).forward).parameters
    if "token_type_ids" in takes:
        return "tokens of its prompts see those after them"
    if "position_ids" not in takes:
        return "its tokens cannot be told another position than that in their row"
    given = model.generation_config
    for name, neutral in _GREEDY.items():
        if getattr(given, name, None) not in neutral:
            return f"the checkpoint's generation_config sets {name}"
    return None


class PrefixCache:
    """Keys and values of some prefixes of equal length."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        positions: Tensor,
        further: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Send prefixes through a model.

        Args:
            model: of transformers, without its head.
            input_ids: int64 [G, P].
            positions: int64 [G, P], or [axes, G, P] where the model counts along several.
            further: all else that it takes of these rows, such as their images.
        """
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._named = "cache" if "cache" in parameters else "past_key_values"
        self._axes = positions.shape[0] if positions.dim() == 3 else None
        self.cache = DynamicCache()
        self.hidden = self.forward(
            self.cache, input_ids, torch.ones_like(input_ids), positions, **(further or {})
        )
        """Hidden states, [G, P, width]."""
        last = positions.amax(dim=-1)
        self.following = (last if self._axes is None else last.amax(dim=0)) + 1
        """Int64 [G], the position of what comes next."""
        self.length = input_ids.shape[1]

    def forward(
        self, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor, **further: Any
    ) -> Tensor:
        """Hidden states [n, L, width] of tokens after those in the cache, which they enter.

        Args:
            cache: of n rows.
            ids: int64 [n, L].
            mask: int64 [n, all tokens], 0 where padded.
            positions: of these tokens, [n, L] or [axes, n, L].
            **further: see `PrefixCache`.
        """
        if self._axes is not None and positions.dim() == 2:
            positions = positions.expand(self._axes, *positions.shape)
        hidden: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._named: cache},
            **further,
        ).last_hidden_state
        return hidden


class _GrowingLayer(DynamicLayer):
    """Keys and values of a layer, written into memory that has room for some tokens more."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """Args:
        keys, values: of some prefixes, [G, heads, P, width].
        rows: int64 [n], which of them each row goes on from.
        """
        super().__init__()
        self.device, self.is_initialized = keys.device, True
        self._length = keys.shape[-2]
        self._room = [self._roomy(each.index_select(0, rows)) for each in (keys, values)]
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        begin, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._room[0].shape[-2]:
            more = self._length - begin
            self._room = [self._roomy(each[..., :begin, :], more) for each in self._room]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., begin : self._length, :] = states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._room = [each.index_select(0, indices) for each in self._room]
        self._show()

    def _roomy(self, states: Tensor, more: int = 0) -> Tensor:
        """The same with room behind it."""
        *rows, length, width = states.shape
        found = states.new_empty((*rows, length + max(more, _ROOM), width))
        found[..., :length, :] = states
        return found

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (each[..., : self._length, :] for each in self._room)
        self.keys, self.values = keys, values
        return keys, values


class ContinuedRows:
    """Rows that go on from prefixes; every row has a copy of its prefix's keys and values."""

    def __init__(self, prefixes: PrefixCache, places: Sequence[int]) -> None:
        """Args:
        prefixes: see `PrefixCache`.
        places: of each row's prefix among them.
        """
        self._prefixes = prefixes
        index = torch.tensor(places, device=prefixes.following.device)
        self._cache = DynamicCache()
        layers: Sequence[Any] = prefixes.cache.layers
        self._cache.layers = [_GrowingLayer(each.keys, each.values, index) for each in layers]
        self._following = prefixes.following[index]
        self._mask = index.new_ones((len(places), prefixes.length))

    def feed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [n, L, width] of the next tokens of each row.

        Args:
            ids: int64 [n, L].
            mask: int64 [n, L], 0 where padded: no token sees those, and positions pass them over.
        """
        positions = self._following[:, None] + mask.cumsum(dim=1) - 1
        self._following = self._following + mask.sum(dim=1)
        self._mask = torch.cat([self._mask, mask], dim=1)
        return self._prefixes.forward(self._cache, ids, self._mask, positions)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone: int64, their places."""
        self._cache.batch_select_indices(rows)
        self._following, self._mask = self._following[rows], self._mask[rows]
