"""Responses that begin alike as branches of one row, so that image and prompt are computed once.

Chosen and rejected responses stand after the same image and prompt. A row of such a sample is what
its responses have in common from the beginning, then the rest of each, one after the other. A token
sees what comes before it in its own response alone, and stands at the position that it has there:
every response gets the numbers that it would get in a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, PretrainedConfig

from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.block_attention import ARGUMENT, FUSED, Block, blocks_of
from diffalign.models.vlm.quirks.base import CHUNKED, FULL, SLIDING, AbstractFamily, family_of

Prefix = Literal["shared", "repeated", "auto"]

_ATTENTION = frozenset({FULL, SLIDING, CHUNKED})
"""Kinds of layers in which a token knows of others by the mask alone."""
_MASK_A_KIND = (
    "gemma2",
    "gemma3_text",
    "llama4_text",
    "qwen2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
)
"""Language models that take one mask for each kind of their layers; others take one for all."""
ATTENTION_WITH_MASKS = ("sdpa", "eager")
"""Implementations of attention that take a mask of four dimensions, each in a form of its own."""
_IN_COMMON, PADDING = 0, -1
"""Segments of a row that are no branch; branches count from 1."""


def prefix_obstacle(
    config: PretrainedConfig, *, asked: Prefix, lora: LoraSettings | None
) -> str | None:
    """Why every response needs a row of its own; None where responses are branches of one.

    Args:
        config: of a class for image-text-to-text generation.
        asked: the setting `model.prefix`.
        lora: of the adapter; None where there is none.
    """
    if asked == "repeated":
        return "model.prefix is repeated"
    if lora is not None and lora.dropout > 0:
        return "dropout of an adapter is sampled anew for every response"
    return mask_obstacle(config)


def mask_obstacle(config: PretrainedConfig) -> str | None:
    """Why a family does not take a mask of four dimensions; None where it does. It is told by its
    configuration and by what its model takes.

    transformers hands a mask of four dimensions to every layer as it is, and so loses all that a
    layer would have changed in it.
    """
    text = config.get_text_config()
    classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = classes[0] if isinstance(classes, tuple) else classes
    takes = inspect.signature(model.forward).parameters
    family = family_of(config)
    if others := sorted(set(family.kinds) - _ATTENTION):
        return f"a mask does not keep responses apart in its layers of the kind {', '.join(others)}"
    if set(family.kinds) - {FULL} and text.model_type not in _MASK_A_KIND:
        return (
            f"its layers are of the kinds {', '.join(family.kinds)}, and {text.model_type} is not "
            f"known to take a mask for each"
        )
    if getattr(text, "cross_attention_layers", None):
        return "its layers look at images by a mask of their own, a row for every response"
    if "token_type_ids" in takes and not family.sees_ahead:
        return "some of its tokens see those after them, and which ones is not known"
    if "position_ids" not in takes:
        return "its tokens stand where they are in a row, and cannot be told another position"
    return None


def packing_obstacle(config: PretrainedConfig, *, attention: str) -> str | None:
    """Why rows do not go one after the other in one sequence; None where they can.

    Args:
        config: of a class for image-text-to-text generation.
        attention: the setting `model.attention`, or how its language model attends.
    """
    alone = "and under sdpa alone are rows of one sequence kept apart"
    if attention not in FUSED:
        return f"model.attention is {attention}, {alone}"
    language = MODEL_MAPPING.get(type(config.get_text_config()), None)
    if not getattr(language, "_supports_sdpa", True):
        return f"its language model attends eagerly, {alone}"
    if family_of(config).longest_branched is not None:
        return "its layers scale attention by where in a sequence a token stands"
    return mask_obstacle(config)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of k responses to each of n samples stand in n rows, one a sample."""

    segments: Tensor
    """Int64 [n, L]: 0 for what the responses of a sample have in common, 1 to k for the rest of
    each of them, -1 for padding at the end."""
    shifts: Tensor
    """Int64 [n, L], how many tokens of other branches stand before each token: positions go on
    after what is in common."""
    prefixes: Tensor
    """Int64 [n], tokens that the responses of a sample have in common."""
    offsets: Tensor
    """Int64 [k, n], how many tokens of other branches stand before a response's own."""
    masks: tuple[Tensor, ...]
    """Of each response, [n, L of that response]: 0 where it was padded."""

    @classmethod
    def of(cls, ids: Sequence[Tensor], masks: Sequence[Tensor]) -> Layout:
        """Lay out rows that begin alike; one row a sample stays as it is.

        Args:
            ids: of k responses next to what stands before them, int64 [n, L] each, right-padded.
            masks: the same shapes, 0 where padded.
        """
        lengths = torch.stack([mask.sum(dim=1) for mask in masks])
        prefixes = lengths[0]
        for theirs, mask in zip(ids[1:], masks[1:], strict=True):
            width = min(theirs.shape[1], ids[0].shape[1])
            alike = theirs[:, :width] == ids[0][:, :width]
            alike = alike & mask[:, :width].bool() & masks[0][:, :width].bool()
            prefixes = prefixes.minimum(alike.long().cumprod(dim=1).sum(dim=1))
        own = lengths - prefixes
        offsets = own.cumsum(dim=0) - own
        height, width = len(prefixes), int((prefixes + own.sum(dim=0)).max())
        segments = ids[0].new_full((height, width), PADDING)
        shifts = torch.zeros_like(segments)
        layout = cls(
            segments=segments,
            shifts=shifts,
            prefixes=prefixes,
            offsets=offsets,
            masks=tuple(masks),
        )
        for branch in range(len(ids)):
            rows, columns = layout._own(branch)
            places = layout._places(branch, rows, columns)
            segments[rows, places] = torch.where(columns < prefixes[rows], _IN_COMMON, branch + 1)
            shifts[rows, places] = places - columns
        return layout

    def row(self, values: Sequence[Tensor], *, padding: int = 0) -> Tensor:
        """What the rows of the responses had at each token, [n, L of each], in the rows of here."""
        found = values[0].new_full(self.segments.shape, padding)
        for branch, theirs in enumerate(values):
            rows, columns = self._own(branch)
            found[rows, self._places(branch, rows, columns)] = theirs[rows, columns]
        return found

    def blocks(self) -> tuple[Block, ...]:
        """Which of their tokens attend together."""
        own = torch.stack([mask.sum(dim=1) for mask in self.masks]) - self.prefixes
        return blocks_of(self.prefixes.tolist(), own.T.tolist())

    def after_prefix(self, branch: int) -> Tensor:
        """Which tokens of a response's rows are its own, bool [n, L of that response]."""
        mask = self.masks[branch]
        columns = torch.arange(mask.shape[1], device=mask.device)
        return mask.bool() & (columns >= self.prefixes[:, None])

    def before(self, branch: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where the token stands after which another one is predicted.

        Args:
            branch: which response.
            rows, columns: int64 [N] each, of predicted tokens in the rows of that response; no
                column is 0.

        Returns:
            Int64 [N] each, its row and column here.
        """
        return rows, self._places(branch, rows, columns - 1)

    def _own(self, branch: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens that a response brings; the first one brings all."""
        some = self.masks[0].bool() if branch == 0 else self.after_prefix(branch)
        rows, columns = some.nonzero(as_tuple=True)
        return rows, columns

    def _places(self, branch: int, rows: Tensor, columns: Tensor) -> Tensor:
        shifts = torch.where(columns >= self.prefixes[rows], self.offsets[branch][rows], 0)
        return columns + shifts


def stacked_blocks(layouts: Sequence[Layout]) -> tuple[Block, ...]:
    """The blocks of the rows of several layouts, one below the other."""
    found: list[Block] = []
    above = 0
    for layout in layouts:
        found += [replace(block, row=above + block.row) for block in layout.blocks()]
        above += len(layout.segments)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Rows of which some have branches, as a model is told of them."""

    segments: Tensor
    """See `Layout`."""
    positions: Tensor
    """Int64 [n, L], or [axes, n, L] where a model counts along several axes."""
    columns: Tensor
    """Int64 [n, L], which token it would be in a row for each response."""
    blocks: Tensor | None
    """Int64 [n, L], see `AbstractFamily.blocks`."""
    family: AbstractFamily
    """How its layers attend."""
    fused: bool
    """Whether torch's fused attention reads the masks; else they are added to scores."""
    parts: tuple[Block, ...] = ()
    """The same as `segments` in other words, for attention that computes part by part."""
    rows: Tensor | None = None
    """Int64 [n, L], which of the rows that stand one after the other a token is of; None where
    each stands alone."""

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        segments: Tensor,
        shifts: Tensor,
        inputs: Mapping[str, Tensor],
        parts: tuple[Block, ...] = (),
    ) -> Branches:
        """Ask a model where tokens would stand in plain rows, and let branches begin alike.

        No branch holds an image, so that in all of them positions count up by one.

        Args:
            model: of transformers, without its head.
            segments, shifts: see `Layout`, on the model's device.
            inputs: `input_ids` and `attention_mask`, [n, L], and all else that the model takes.
            parts: of the same rows, where its layers attend by them.
        """
        height, width = segments.shape
        plain = columns = torch.arange(width, device=segments.device).expand(height, width)
        if hasattr(model, "get_rope_index") and "image_grid_thw" in inputs:
            accepted = inspect.signature(model.get_rope_index).parameters
            plain, _ = model.get_rope_index(**{k: v for k, v in inputs.items() if k in accepted})
        family = family_of(model.config)
        plain_layers = not (set(family.kinds) - {FULL} or family.window or family.sees_ahead)
        return cls(
            segments=segments,
            positions=plain - shifts,
            columns=columns - shifts,
            blocks=family.blocks(inputs),
            family=family,
            fused=model.config.get_text_config()._attn_implementation in FUSED,
            parts=parts if plain_layers else (),
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model, in place of a plain mask."""
        parts = {ARGUMENT: self.parts} if self.parts else {}
        return {"attention_mask": self.masks(), "position_ids": self.positions, **parts}

    def masks(self) -> Tensor | dict[str, Tensor]:
        """One mask for all layers, or one for each kind of them."""
        kinds = self.family.kinds
        if set(kinds) - {FULL}:
            return {kind: self._mask(kind) for kind in kinds}
        return self._mask(FULL if kinds or self.family.window is None else SLIDING)

    def _mask(self, kind: str) -> Tensor:
        seen = branch_mask(
            self.segments,
            self.columns,
            window=self.family.window if kind == SLIDING else None,
            chunk=self.family.chunk if kind == CHUNKED else None,
            blocks=self.blocks,
            blocks_within=self.family.blocks_within_window,
        )
        if self.rows is not None:
            seen = seen & same_row(self.rows)
        if self.fused:
            return seen
        lowest = torch.finfo(torch.float32).min  # -inf would make a row of nothing else nan
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, lowest)


def branch_mask(
    segments: Tensor,
    columns: Tensor | None = None,
    *,
    window: int | None = None,
    chunk: int | None = None,
    blocks: Tensor | None = None,
    blocks_within: bool = True,
) -> Tensor:
    """Which tokens see which: those before them in their own branch or in what is in common.

    Args:
        segments: int64 [n, L], see `Layout`.
        columns: int64 [n, L], see `Branches`; for windows and chunks.
        window: tokens at most so far back are seen, the token itself counted.
        chunk: tokens of the same piece of this length are seen.
        blocks: int64 [n, L], tokens of the same one, but -1, see each other as well.
        blocks_within: whether they do so within the window or chunk alone.

    Returns:
        Bool [n, 1, L, L], for torch's fused attention alone: others would add it to their scores.
        Every token sees itself, so that no row of it is empty.
    """

    def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
        return values[:, :, None], values[:, None, :]

    own, theirs = pairs(segments)
    width = segments.shape[1]
    seen = torch.ones((width, width), dtype=torch.bool, device=segments.device).tril()
    near = torch.ones_like(seen)
    if columns is not None:
        here, there = pairs(columns)
        if window is not None:
            near = here - there < window
        if chunk is not None:
            near = here // chunk == there // chunk
    if blocks is not None:
        mine, others = pairs(blocks)
        together = (mine == others) & (mine >= 0)
        seen = (seen | together) & near if blocks_within else (seen & near) | together
    else:
        seen = seen & near
    return (seen & ((theirs == _IN_COMMON) | (theirs == own)))[:, None]


def same_row(rows: Tensor) -> Tensor:
    """Which tokens of a sequence are of one row, bool [n, 1, L, L].

    Args:
        rows: int64 [n, L], see `Branches`.
    """
    return (rows[:, None, :] == rows[:, :, None])[:, None]


def disagreement(
    found: Tensor, expected: Tensor, counts: Sequence[int], dtype: torch.dtype
) -> tuple[float, float]:
    """How far two ways to the same log-probabilities are apart, and how far rounding may take them.

    Args:
        found, expected: of the tokens of some responses, in order, [P] each.
        counts: how many of the tokens are of each response.
        dtype: in which the network computes.

    Returns:
        In float32 the largest difference and 0.001; in half precision the largest mean over the
        tokens of a response, and 16 roundings.
    """
    difference = (found - expected).abs()
    if dtype == torch.float32:
        return float(difference.max()), 1e-3
    means = [part.mean() for part in difference.split(list(counts))]
    return float(torch.stack(means).max()), 16 * torch.finfo(dtype).eps
