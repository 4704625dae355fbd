"""Attention over rows of which every part sees only some earlier ones, part by part.

A row with branches is a tree: what its responses have in common, then the rest of each. One mask
over the whole row makes a kernel compute all pairs of tokens, most of which never meet, and rules
out the kernels that know of causal attention. Here every part attends by itself: what is in common
together with the first branch causally, each further branch to what is in common and to itself.

It is a function of transformers' `AttentionInterface`, and does what its `sdpa` does for rows that
are told no parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "diffalign_blocks"
"""Of this attention in transformers' registry."""
FUSED = ("sdpa", NAME)
"""Implementations of attention that take a mask of yes and no."""
ARGUMENT = "attention_blocks"
"""Keyword argument of a model's forward that brings the blocks to its layers."""


@dataclass(frozen=True)
class Block:
    """Tokens of one row that attend together: causally to each other, and to some before them."""

    row: int
    start: int
    end: int
    """Columns from `start` up to `end`."""
    context: tuple[int, int]
    """They see the columns from the first up to the second as well, all of which precede `start`;
    both are the same where there are none."""

    def moved(self, row: int, by: int) -> Block:
        """The same tokens so many columns on, in another row."""
        first, last = self.context
        return Block(row, self.start + by, self.end + by, (first + by, last + by))


def blocks_of(prefixes: Sequence[int], branches: Sequence[Sequence[int]]) -> tuple[Block, ...]:
    """The blocks of rows with branches.

    Args:
        prefixes: tokens of each row that its branches have in common.
        branches: of each row, how many tokens its branches have after them, in their order.
    """
    blocks = []
    for row, (prefix, lengths) in enumerate(zip(prefixes, branches, strict=True)):
        start = prefix + lengths[0]
        blocks.append(Block(row, 0, start, context=(0, 0)))
        for length in lengths[1:]:
            if length:
                blocks.append(Block(row, start, start + length, context=(0, prefix)))
            start += length
    return tuple(blocks)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer: by the blocks that the forward was told, or as `sdpa` does it.

    Args:
        module: the layer.
        query: [n, heads, L, width].
        key, value: [n, heads for keys and values, L, width].
        attention_mask: read where there are no blocks.
        options: as transformers gives them, with `ARGUMENT` among them where there are blocks.

    Returns:
        [n, L, heads, width], 0 where no block is, and no weights.
    """
    blocks: Sequence[Block] | None = options.pop(ARGUMENT, None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    options.pop("is_causal", None)
    height, _, width, _ = query.shape
    parts: list[list[Tensor]] = [[] for _ in range(height)]
    for block in blocks:
        row, own = slice(block.row, block.row + 1), slice(block.start, block.end)
        keys, values = key[row, :, own], value[row, :, own]
        mask = None
        before = slice(*block.context)
        if context := before.stop - before.start:
            keys = torch.cat([key[row, :, before], keys], dim=2)
            values = torch.cat([value[row, :, before], values], dim=2)
            length = block.end - block.start
            mask = torch.ones((length, context + length), dtype=torch.bool, device=query.device)
            mask = mask.tril(context)[None, None]
        found, _ = sdpa_attention_forward(
            module, query[row, :, own], keys, values, mask, is_causal=mask is None, **options
        )
        parts[block.row].append(found)
    rows = []
    for some in parts:
        together = torch.cat(some, dim=1)
        missing = width - together.shape[1]
        rows.append(torch.nn.functional.pad(together, (0, 0, 0, 0, 0, missing)))
    return torch.cat(rows), None


def attend_by_blocks(model: Any) -> None:
    """Let the language model of a vision-language model attend by blocks where it is told some.

    Args:
        model: of transformers; one that does not attend by `sdpa` stays as it is.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
