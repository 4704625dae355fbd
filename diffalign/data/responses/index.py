"""The comparisons of a data set of responses: which are trained on, and which are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from diffalign.data.held_out import group_of_images, is_held_out, refuse_nothing
from diffalign.data.plans import Counts, HeldOutPair, Index
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.formats.base import numbered
from diffalign.data.responses.micro_batches import text_size
from diffalign.data.responses.ranking import RankingConfig, ranked, read_pair_numbers
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
    held_out: Comparisons | None = None
    """Usable comparisons that are not among these, all of them in `index.held_out`."""
    unranked: int = 0
    """Comparisons that are left out because nobody knows the number that they are ranked by."""
    sizes: np.ndarray | None = None
    """`text_size` of each, int64 [n, 4], where they were asked for."""


def index_comparisons(
    data: OpenedResponses,
    *,
    limit: int | None,
    skips: SkipLog,
    asked_for: frozenset[str] | None = None,
    holdout: float | None = None,
    ranking: RankingConfig | None = None,
    measured: frozenset[str] | None = None,
) -> Comparisons:
    """Read the text of all rows, and no image unless some are held out.

    Args:
        data: the data set.
        limit: only the first so many comparisons; None for all.
        skips: where those that are unusable as text go.
        asked_for: responses that the objective reads, where rows are unpaired: one of another
            response is left out; None takes all.
        holdout: share of the images whose comparisons are held out; None for nothing.
        ranking: which of the others are kept, and in which order; None for all.
        measured: responses that are read, where the lengths of texts are wanted; else None.

    Raises:
        DataError: no comparison is usable, none is held out where a share is to be, or the numbers
            of a ranking are not those of this data.
    """
    known: Mapping[str, float] = {}
    if ranking is not None and ranking.file is not None:
        known = read_pair_numbers(ranking.file, ranking.by, data=data.fingerprint)
    numbers: list[float | None] = []
    left_out: Counter[LeftOut] = Counter()
    labels: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    held_places: list[tuple[int, int]] = []
    held_out: list[HeldOutPair] = []
    sizes: list[tuple[int, int, int, int]] = []
    pairs = read = 0
    for number, (row, found) in enumerate(data.with_rows()):
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
            elif held := _held_out_pair(data, number, place, holdout, len(held_places)):
                held_places.append((number, place))
                held_out.append(held)
            else:
                places.append((number, place))
                if ranking is not None:
                    name = numbered(row.name, place, len(found))
                    of_file = ranking.file is not None
                    numbers.append(known.get(name) if of_file else data.gap(comparison, row))
                if measured is not None:
                    sizes.append(text_size(comparison, measured))
    counts = Counts(rows=read, pairs=pairs, left_out=left_out, held_out=len(held_out))
    if not places:
        first = f", for example {skips.first(1)[0]}" if len(skips) else ""
        raise DataError(
            f"there is nothing to train on in {data.summary}: {counts.describe()}, none of them "
            f"usable{first}"
        )
    refuse_nothing(held_out, holdout, counts, section="responses")
    others = _numbered(held_places, counts, tuple(held_out)) if held_out else None
    lengths = None if measured is None else np.array(sizes, dtype=np.int64)
    if ranking is None:
        return replace(_numbered(places, counts), labels=labels, sizes=lengths, held_out=others)
    order = ranked(numbers, ranking)
    kept = _numbered([places[place] for place in order.kept], counts, bands=order.bands)
    return replace(
        kept,
        labels=labels,
        sizes=None if lengths is None else lengths[order.kept],
        held_out=others,
        unranked=order.unknown,
    )


def _numbered(
    places: list[tuple[int, int]],
    counts: Counts,
    held_out: tuple[HeldOutPair, ...] = (),
    *,
    bands: np.ndarray | None = None,
) -> Comparisons:
    numbers = np.arange(len(places), dtype=np.int64)
    index = Index(members=numbers, counts=counts, held_out=held_out, bands=bands)
    return Comparisons(places=np.array(places, dtype=np.int64), index=index)


def _held_out_pair(
    data: OpenedResponses, row: int, place: int, holdout: float | None, number: int
) -> HeldOutPair | None:
    """The comparison as the `number`-th that is held out, if it is."""
    if holdout is None:
        return None
    pair = data.pair(row, place)
    if isinstance(pair, Skipped):  # its image is missing, which the loader says where it is met
        return None
    group = group_of_images(pair.images, "\n".join(turn.text for turn in pair.turns))
    if not is_held_out(group, holdout):
        return None
    return HeldOutPair(number=number, sample_id=pair.sample_id, group=group)
