"""Which prompts a round samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from diffalign.data.order import Order
from diffalign.seeding import derive_seed

AnyVisit = TypeVar("AnyVisit")
"""What a collector knows of one image, or of one prompt, that it samples."""


@dataclass(frozen=True)
class Visit:
    """One prompt of a round."""

    prompt: str
    seed: int
    """From which all noise of this visit derives."""


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
    order = Order(derive_seed(run_seed, "prompts"), [np.arange(len(prompts))])
    return [
        Visit(prompts[turn.member], derive_seed(run_seed, "visit", turn.position))
        for turn in order.micro_batch(number, count)
    ]


def in_batches(visits: Sequence[AnyVisit], size: int) -> list[list[AnyVisit]]:
    """Consecutive parts of at most `size` visits, sampled together whatever the number of ranks."""
    return [list(visits[i : i + size]) for i in range(0, len(visits), size)]
