"""Questions that the tiny LLaVA is asked about a scene, and the responses that are right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from diffalign.playground.multi_object_scenes import kinds_in, sample_multi_object_scene
from diffalign.playground.scenes import COLOURS, KINDS, SHAPES, Kind, Scene

DESCRIBE = "Describe the picture."
"""Asks for a sentence an object."""

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")
"""How the absent objects of yes-or-no questions are chosen: see `absent_kinds`."""

_COUNTED_SCENES = 4000
"""From which frequencies and co-occurrence are counted."""


def existence_question(kind: Kind) -> str:
    """To be answered with `YES` or `NO`."""
    return f"Is there {kind} in the picture?"


YES, NO = "Yes.", "No."


@dataclass(frozen=True)
class AttributeQuestion:
    """A question for the colour of the only object of a shape, or the other way round."""

    text: str
    attribute: str
    """The right colour or shape."""
    response: str
    """A sentence that ends with the attribute."""


def attribute_questions(scene: Scene) -> Iterator[AttributeQuestion]:
    """Every such question that a scene decides, colours first, in reading order."""
    kinds = kinds_in(scene)
    for kind in kinds:
        if sum(other.shape == kind.shape for other in kinds) == 1:
            yield AttributeQuestion(
                f"What colour is the {kind.shape}?",
                kind.colour,
                f"The {kind.shape} is {kind.colour}.",
            )
    for kind in kinds:
        if sum(other.colour == kind.colour for other in kinds) == 1:
            yield AttributeQuestion(
                f"What shape is the {kind.colour} object?",
                kind.shape,
                f"The {kind.colour} object is a {kind.shape}.",
            )


def attribute_named(response: str, question: AttributeQuestion) -> str | None:
    """The first colour or shape of a response, whichever is asked for; None where it names none.

    What repeats the question is not counted: it is of the other sort.
    """
    sort = COLOURS if question.attribute in COLOURS else SHAPES
    return next((word for word in re.findall(r"\w+", response.lower()) if word in sort), None)


def absent_kinds(scene: Scene, split: Split, seed: int) -> list[Kind]:
    """As many kinds that a scene does not show as it shows: what a split of POPE asks next to them.

    Args:
        scene: for each of its objects, one absent kind is chosen.
        split: `random`; `popular`, the most frequent ones; `adversarial`, for each object in turn
            the one that is seen with it most often.
        seed: of the random split; equal seeds give equal kinds.

    Source: Li et al. 2023, arXiv:2305.10355, section 5.1.
    """
    present = kinds_in(scene)
    absent = [kind for kind in KINDS if kind not in present]
    if split == "random":
        order = np.random.default_rng(seed).permutation(len(absent))
        return [absent[i] for i in order[: len(present)]]
    together = _together()
    if split == "popular":
        return sorted(absent, key=lambda kind: -together[kind, kind])[: len(present)]
    chosen: list[Kind] = []
    for kind in present:
        left = [other for other in absent if other not in chosen]
        chosen.append(max(left, key=lambda other: together[kind, other]))
    return chosen


@cache
def _together() -> dict[tuple[Kind, Kind], int]:
    """How many scenes show two kinds, and, for a pair of equals, how many show that one."""
    counts = dict.fromkeys(((a, b) for a in KINDS for b in KINDS), 0)
    for i in range(_COUNTED_SCENES):
        kinds: Sequence[Kind] = kinds_in(sample_multi_object_scene((20_000_003, i)))
        for a in kinds:
            for b in kinds:
                counts[a, b] += 1
    return counts
