"""The order of a round: the prompts that it samples, and the steps that it trains on.

Steps come in whole optimiser steps of equal micro-batches. A global micro-batch is what all ranks
together see at once where a run starts, and `diffalign.data.layout` says which part of it each
takes. So one process with a batch of 2n and two with n train on the same steps in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from diffalign.data.layout import Layout
from diffalign.data.order import Order, Position
from diffalign.seeding import cpu_generator, derive_seed

AnyVisit = TypeVar("AnyVisit")
"""One image, or one prompt, that a collector samples."""


@dataclass(frozen=True)
class Visit:
    """One prompt of a round."""

    prompt: str
    seed: int
    """From which all noise of this visit derives."""


def positions_of_round(members: int, number: int, *, count: int, run_seed: int) -> list[Position]:
    """Which of so many members round `number` visits, the same on every rank.

    Rounds walk through an endless sequence of permutations, so that all are visited equally often.
    """
    order = Order(derive_seed(run_seed, "prompts"), [np.arange(members)])
    return order.micro_batch(number, count)


def visits_of_round(
    prompts: Sequence[str], number: int, *, count: int, run_seed: int
) -> list[Visit]:
    """The prompts of round `number`, the same on every rank.

    Rounds walk through an endless sequence of permutations of the prompts, so all of them are seen
    equally often, and each visit has noise of its own.

    Args:
        prompts: all of them.
        number: of the round, from 0.
        count: prompts in each round.
        run_seed: of the run.
    """
    positions = positions_of_round(len(prompts), number, count=count, run_seed=run_seed)
    return [
        Visit(prompts[position.member], derive_seed(run_seed, "visit", position.index))
        for position in positions
    ]


def in_batches(visits: Sequence[AnyVisit], size: int) -> list[list[AnyVisit]]:
    """Consecutive parts of at most `size` visits, sampled together whatever the number of ranks."""
    return [list(visits[i : i + size]) for i in range(0, len(visits), size)]


Item = TypeVar("Item", bound=Hashable)


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order that depends on the seed alone."""
    order = torch.randperm(len(items), generator=cpu_generator(seed))
    return [items[i] for i in order.tolist()]


def pack_pool(
    items: Sequence[Item], *, rows: int, accumulation: int, seed: int
) -> list[list[Item]]:
    """Shuffle all steps together and cut them into micro-batches, as SPO trains.

    Args:
        items: what can be trained on.
        rows: of a global micro-batch.
        accumulation: micro-batches of an optimiser step.
        seed: of the order.

    Returns:
        Micro-batches; steps that do not fill an optimiser step are left out.
    """
    return _whole_steps(_cut(shuffled(items, seed), rows), accumulation)


def pack_pairs(
    pairs: Sequence[Sequence[Item]], *, rows: int, accumulation: int, seed: int
) -> list[list[Item]]:
    """Keep the steps of a pair close: D3PO's order, whose gradients gather over a trajectory.

    Micro-batch j of a group of `rows` pairs holds one step of each pair; every pair goes through
    its steps in an order of its own.

    Args:
        pairs: the steps of each pair, equally many.
        rows, accumulation, seed: as for `pack_pool`.
    """
    permuted = [
        shuffled(steps, derive_seed(seed, "steps", number)) for number, steps in enumerate(pairs)
    ]
    groups = _cut(shuffled(range(len(pairs)), seed), rows)
    batches = [
        [permuted[number][place] for number in group]
        for group in groups
        for place in range(len(permuted[group[0]]))
    ]
    return _whole_steps(batches, accumulation)


def own_parts(
    batches: Sequence[Sequence[Item]], layout: Layout, samples: int
) -> Iterator[Sequence[Item]]:
    """The parts that this rank trains on, one a forward pass.

    Args:
        batches: packed global micro-batches.
        layout: of the run.
        samples: those that all ranks have seen before.
    """
    for part in layout.own_parts_of(samples, len(batches) * layout.micro_batch):
        number, place = layout.place(part.start)
        yield batches[number][place : place + len(part)]


def _cut(items: Sequence[Item], rows: int) -> list[list[Item]]:
    """Consecutive parts of equal length; what is left over is left out."""
    return [list(items[i : i + rows]) for i in range(0, len(items) - rows + 1, rows)]


def _whole_steps(batches: list[list[Item]], accumulation: int) -> list[list[Item]]:
    return batches[: len(batches) // accumulation * accumulation]
