"""Samples of an optimiser step by their length: who computes which, and what goes together.

A step is the same samples whatever becomes of them here. Ranks get equally many, with about as many
tokens each; a rank cuts its own, the longest first, into micro-batches that hold no more tokens
than it was told, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_out(sizes: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal samples out to ranks, the largest first, each to the rank that has least so far.

    Args:
        sizes: of the samples of a step, a multiple of `ranks`.
        ranks: how many there are.

    Returns:
        The places of each rank's samples in `sizes`, ascending, equally many each.
    """
    room = len(sizes) // ranks
    assert room * ranks == len(sizes), "a step is cut for its processes where a run starts"
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        open_ranks = (rank for rank in range(ranks) if len(shares[rank]) < room)
        least = min(open_ranks, key=lambda rank: (totals[rank], rank))
        shares[least].append(place)
        totals[least] += sizes[place]
    return [sorted(share) for share in shares]


def cut(
    samples: Sequence[Sequence[int]], *, tokens: int, pack_to: int | None = None
) -> list[list[int]]:
    """Cut samples into micro-batches, so that those of about one length go together.

    Args:
        samples: the lengths of the rows of each, one at least.
        tokens: that a micro-batch has at most, padding included. A sample that has more by itself
            is a micro-batch of its own.
        pack_to: see `sequences`.

    Returns:
        The places of the samples of each micro-batch in `samples`, the longest first: of all ways
        to cut them in that order the one with the least padding, where a micro-batch counts as
        `tokens` / 16 by itself, so that none is cut for the last percent.
    """
    order = sorted(range(len(samples)), key=lambda n: (-max(samples[n]), -sum(samples[n]), n))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first so many: cost, and last cut before
    for end in range(1, len(order) + 1):
        rows: list[int] = []
        found: list[tuple[float, int]] = []
        for start in reversed(range(end)):
            rows = [*samples[order[start]], *rows]
            size = padded_tokens(rows, pack_to)
            if size > tokens and found:
                break
            found.append((best[start][0] + size + tokens / 16, start))
        best.append(min(found))
    parts: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        parts.insert(0, order[start:end])
        end = start
    return parts


def sequences(rows: Sequence[int], pack_to: int | None) -> list[list[int]]:
    """Put rows one after the other into as few sequences as their order allows.

    Args:
        rows: their lengths, in tokens.
        pack_to: that rows of one sequence have at most together; a longer row is alone. None gives
            every row a sequence of its own.

    Returns:
        The places in `rows` of those of each sequence, in order.
    """
    found: list[list[int]] = []
    filled = 0
    for place, length in enumerate(rows):
        if found and pack_to is not None and filled + length <= pack_to:
            found[-1].append(place)
            filled += length
        else:
            found.append([place])
            filled = length
    return found


def padded_tokens(rows: Sequence[int], pack_to: int | None = None) -> int:
    """Tokens of the rectangle that rows go through a model in, padding included.

    Args:
        rows: their lengths.
        pack_to: see `sequences`.
    """
    widths = [sum(rows[place] for place in some) for some in sequences(rows, pack_to)]
    return len(widths) * max(widths, default=0)


def padding_share(parts: Sequence[Sequence[int]], pack_to: int | None = None) -> float:
    """Share of padding among all tokens that go through a model, in [0, 1).

    Args:
        parts: lengths of the rows of each micro-batch.
        pack_to: see `sequences`.
    """
    whole = sum(padded_tokens(rows, pack_to) for rows in parts)
    return 1 - sum(map(sum, parts)) / whole
