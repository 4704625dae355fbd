"""Every usable comparison of a data set, known before the first image is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from diffalign.data.plans import Counts, Index
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.reading import OpenedResponses
from diffalign.data.skipping import LeftOut, SkipLog, Skipped
from diffalign.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """An index over comparisons, of which a row may hold several."""

    places: np.ndarray
    """Int64 [n, 2], row and place in it of each usable comparison."""
    index: Index
    """Whose members are the numbers 0 to n - 1."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Usable rows by response, where each holds one; empty for pairs."""


def index_comparisons(
    data: OpenedResponses,
    *,
    limit: int | None,
    skips: SkipLog,
    asked_for: frozenset[str] | None = None,
) -> Comparisons:
    """Read the text of all rows, and no image.

    Args:
        data: the data set.
        limit: only the first so many comparisons; None for all.
        skips: where those that are unusable as text go.
        asked_for: responses that the objective reads, where rows are unpaired: one of another
            response is left out; None takes all.

    Raises:
        DataError: no comparison is usable.
    """
    left_out: Counter[LeftOut] = Counter()
    labels: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    pairs = read = 0
    for number, found in enumerate(data.without_images()):
        if pairs == limit:
            break
        read += 1
        for place, comparison in enumerate(found):
            if pairs == limit:
                break
            if isinstance(comparison, LeftOut):
                left_out[comparison] += 1
                continue
            if asked_for is not None and isinstance(comparison, Comparison):
                if not asked_for & set(comparison.responses):
                    left_out[LeftOut.OTHER_LABEL] += 1
                    continue
                labels.update(list(comparison.responses))
            pairs += 1
            if isinstance(comparison, Skipped):
                skips.add(comparison)
            else:
                places.append((number, place))
    counts = Counts(rows=read, pairs=pairs, left_out=left_out)
    if not places:
        first = f", for example {skips.first(1)[0]}" if len(skips) else ""
        raise DataError(
            f"there is nothing to train on in {data.summary}: {counts.describe()}, none of them "
            f"usable{first}"
        )
    index = Index(members=np.arange(len(places), dtype=np.int64), counts=counts)
    return Comparisons(places=np.array(places, dtype=np.int64), index=index, labels=labels)
