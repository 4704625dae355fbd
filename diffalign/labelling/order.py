"""The order in which items are shown: as they come, at random, or those first on which scorers
disagree."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from diffalign.data.decoding import BadImageError
from diffalign.data.pairs.scored import ScoreTable
from diffalign.data.pairs.scores import ScoreFile, ScoresConfig, scaled
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import ConfigError, DataError
from diffalign.labelling.items import AbstractItems, Content
from diffalign.seeding import derive_seed

Order = Literal["random", "given", "disagreement"]


def ordered(
    items: AbstractItems, order: Order, *, seed: int, scores: Mapping[str, ScoreFile]
) -> tuple[list[int], int]:
    """The numbers of the items in the order in which they are shown.

    Args:
        items: what is shown.
        order: `random` by the seed; `given` as the data has them; `disagreement` those first whose
            scorers disagree most, see `disagreement`, and at the end those without scores.
        seed: of the random order, and among equals.
        scores: files of scores by a name of one's own, for `disagreement`.

    Returns:
        The numbers, and of how many items a score is missing where scores are read.

    Raises:
        ConfigError: too few files are given, or the items are no images.
        DataError: a file is no file of scores, or has none of these images.
    """
    numbers = list(range(len(items.items)))
    if order == "given":
        return numbers, 0
    random.Random(derive_seed("items", seed)).shuffle(numbers)
    if order == "random":
        return numbers, 0
    if items.shows != "images":
        raise ConfigError("order disagreement reads scores of images, and the items are responses")
    if len(scores) < 2:
        raise ConfigError(
            "order disagreement is of two scorers at least: give the files that diffalign score "
            "wrote, as scores='{pick: {file: scores/pickscore.parquet, scorer: pickscore}, clip: "
            "{file: scores/clip.parquet, scorer: clip}}'"
        )
    table = ScoreTable(ScoresConfig(columns=dict(scores), ensemble=tuple(scores)))
    found: dict[int, float | None] = {}
    for number in numbers:
        try:
            found[number] = disagreement(items.content(number), table, list(scores))
        except (BadImageError, UnusableRowError):
            found[number] = None  # told when it is to be shown
    unscored = sum(value is None for value in found.values())
    if unscored == len(numbers):
        raise DataError(
            f"order is disagreement, and the files of scores have no score of any of the "
            f"{unscored} items, by content and prompt: they are of other images"
        )
    return sorted(numbers, key=lambda n: -_or_least(found[n])), unscored


def disagreement(content: Content, table: ScoreTable, names: Sequence[str]) -> float | None:
    """How far apart scorers are about the gaps of an item: the largest standard deviation (of n)
    over the scorers of the gap between two of its images, each in units of the scorer's spread.

    Args:
        content: of the item.
        table: of the scores.
        names: of the scorers.

    Returns:
        None where an image has no score.
    """
    keys = [(digest, content.prompt) for digest in content.digests()]
    rows = [[table.number(scaled(name), key) for name in names] for key in keys]
    known = [[x for x in row if x is not None] for row in rows]
    if any(len(row) < len(names) for row in known):
        return None
    return max(
        statistics.pstdev([a - b for a, b in zip(one, other, strict=True)])
        for one, other in combinations(known, 2)
    )


def _or_least(value: float | None) -> float:
    return -1.0 if value is None else value
