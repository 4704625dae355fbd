"""Rows one after the other in one sequence, each seen by itself alone.

What goes through the model is then hardly padded. Layers that attend part by part
(`block_attention`) compute what each row sees and no more; others are given a mask of all tokens of
a sequence next to each other, so that attention costs the square of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.data.token_budget import sequences
from diffalign.models.devices import send
from diffalign.models.vlm.branches import PADDING
from diffalign.models.vlm.token_scores import ResponseRows


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of n rows of up to L tokens stand in m sequences of up to W."""

    sources: Tensor
    """Int64 [m, W], index into the n * L tokens of all rows of the one that stands there; n * L
    for padding at the end."""
    places: Tensor
    """Int64 [n * L], index into the m * W tokens of all sequences; 0 for padding."""
    rows: Tensor
    """Int64 [m, W], which row a token is of; -1 for padding."""
    starts: tuple[tuple[int, int], ...]
    """Of each row, its sequence and the column where it starts there."""

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, pack_to: int) -> Packing | None:
        """Keep rows in their order, which is that of their images.

        Args:
            lengths: of the n rows.
            width: L.
            pack_to: see `sequences`.

        Returns:
            None where every row is alone.
        """
        packed = sequences(lengths, pack_to)
        if len(packed) == len(lengths):
            return None
        longest = max(sum(lengths[row] for row in some) for some in packed)
        sources = torch.full((len(packed), longest), len(lengths) * width)
        rows = torch.full_like(sources, PADDING)
        places = torch.zeros(len(lengths) * width, dtype=torch.int64)
        starts = []
        for number, some in enumerate(packed):
            start = 0
            for row in some:
                own = torch.arange(lengths[row])
                starts.append((number, start))
                sources[number, start : start + len(own)] = row * width + own
                rows[number, start : start + len(own)] = row
                places[row * width + own] = number * longest + start + own
                start += len(own)
        return cls(sources=sources, places=places, rows=rows, starts=tuple(starts))

    def packed(self, values: Tensor, padding: int = 0) -> Tensor:
        """What rows had at each token, [..., n, L], in the sequences of here, [..., m, W]."""
        flat = values.flatten(-2)
        flat = torch.cat([flat, flat.new_full((*flat.shape[:-1], 1), padding)], dim=-1)
        return flat[..., send(self.sources, values.device)]


def pack(rows: ResponseRows, packing: Packing, *, pad_token_id: int) -> ResponseRows:
    """Rows as a model takes them one after the other; every wanted token is the same.

    Args:
        rows: with `branches`, which say where each of their tokens stands and what it sees.
        packing: of these rows.
        pad_token_id: what sequences end with.
    """
    told = rows.branches
    assert told is not None, "they say what is seen"
    device = rows.input_ids.device
    of_rows = send(packing.rows, device)
    return replace(
        rows,
        input_ids=packing.packed(rows.input_ids, pad_token_id),
        attention_mask=(of_rows != PADDING).long(),
        further={key: packing.packed(values) for key, values in rows.further.items()},
        before=send(packing.places, device)[rows.before],
        branches=replace(
            told,
            segments=packing.packed(told.segments, PADDING),
            positions=packing.packed(told.positions),
            columns=packing.packed(told.columns),
            blocks=None if told.blocks is None else packing.packed(told.blocks, -1),
            rows=of_rows,
            parts=tuple(part.moved(*packing.starts[part.row]) for part in told.parts),
        ),
    )
