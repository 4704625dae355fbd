"""The index of pairs that are read at random: usable rows, and the aspect-ratio bucket of each."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np

from diffalign.data.decoding import BadImageError, Size, upright_size
from diffalign.data.held_out import is_held_out, refuse_nothing
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs
from diffalign.data.pairs.samples import empty_caption
from diffalign.data.pairs.scores import OrderConfig
from diffalign.data.plans import Counts, HeldOutPair, Index
from diffalign.data.rows import AbstractRows, Row
from diffalign.data.skipping import LeftOut, SkipLog, Skipped, UnusableRowError
from diffalign.errors import DataError


def assign_buckets(
    data: OpenedPairs, index: Index, config: PairConfig, skips: SkipLog
) -> dict[Size, np.ndarray]:
    """The sides of a pair share the bucket that is nearest to all of them.

    Args:
        data: read at random.
        index: its pairs.
        config: of the data.
        skips: where pairs go whose headers cannot be read.

    Returns:
        Target size -> indices into `index.members`, rising; no bucket is empty.
    """
    assert isinstance(data.rows, AbstractRows)
    sizes = bucket_sizes(config.resolution)
    members: dict[int, list[int]] = defaultdict(list)
    for member, row in enumerate(index.members):
        shapes = _shapes(data, data.rows.start_of(int(row)), config.max_pixels)
        if isinstance(shapes, Skipped):
            shapes = _shapes(data, data.rows[int(row)], config.max_pixels)
        if isinstance(shapes, Skipped):
            skips.add(shapes)
        else:
            members[nearest_bucket(sizes, shapes)].append(member)
    if not members:
        raise DataError(f"no pair of {config.path} has images whose size can be read")
    return {sizes[bucket]: np.array(found) for bucket, found in sorted(members.items())}


def _shapes(data: OpenedPairs, row: Row, max_pixels: int) -> tuple[Size, ...] | Skipped:
    pair = data.read(row)
    assert not isinstance(pair, LeftOut), "the index holds pairs only"
    if isinstance(pair, Skipped):
        return pair
    shapes = []
    for side in data.columns.sides:
        try:
            shapes.append(upright_size(getattr(pair, side), max_pixels=max_pixels))
        except BadImageError as error:
            return Skipped(
                sample_id=pair.sample_id, reason=error.reason, detail=error.detail, side=side
            )
    return tuple(shapes)


def index_rows(
    rows: AbstractRows,
    columns: PairColumns,
    *,
    limit: int | None,
    skips: SkipLog,
    holdout: float | None = None,
) -> Index:
    """Read labels and captions of all rows, and no image.

    Raises:
        DataError: a label is not allowed, no row is a pair, or none is held out where a share is
            to be.
    """
    left_out: Counter[LeftOut] = Counter()
    members: list[int] = []
    gaps: list[float] = []
    order = None if columns.scored is None else columns.scored.config.order
    held_out: list[HeldOutPair] = []
    pairs = read = 0
    for number, row in enumerate(rows.scan(columns.light())):
        if limit is not None and pairs == limit:
            break
        read += 1
        skipped: Skipped | None
        try:
            verdict = columns.chosen(row)
            if isinstance(verdict, LeftOut):
                left_out[verdict] += 1
                continue
            caption = columns.caption(row)
            skipped = empty_caption(columns.sample_id(row), caption)
            columns.strength_of(row)
            gap = 0.0
            if columns.scored is not None and order is not None:
                gap = columns.scored.gap(row, order.by, verdict)
        except UnusableRowError as error:
            skipped = error.skipped(columns.sample_id(row))
        pairs += 1
        if skipped is not None:
            skips.add(skipped)
        elif is_held_out(caption, holdout):
            name = columns.sample_id(row)
            held_out.append(HeldOutPair(number=number, sample_id=name, group=caption))
        else:
            members.append(number)
            gaps.append(gap)
    counts = Counts(
        rows=read, pairs=pairs, left_out=left_out, held_out=len(held_out), noun=rows.noun
    )
    if not members:
        unusable = "".join(f"\n  {line}" for line in skips.first(10))
        without = f", none of which can be used:{unusable}" if pairs > len(held_out) else ""
        raise DataError(f"there is nothing to train on in {counts.describe()}{without}")
    refuse_nothing(held_out, holdout, counts, section="data")
    numbers = np.array(members, dtype=np.int64)
    bands = None
    if order is not None:
        bands = bands_of(np.array(gaps), order)
        if order.only is not None:
            numbers, bands = numbers[bands == order.only - 1], None
    return Index(members=numbers, counts=counts, held_out=tuple(held_out), bands=bands)


def bands_of(gaps: np.ndarray, order: OrderConfig) -> np.ndarray:
    """The band of each pair, from 0 for what is seen first; int64 [n].

    Args:
        gaps: of the pairs, [n]. Of equal ones those that come first in the data come first.
        order: how many bands there are, and which comes first.

    Raises:
        DataError: there are fewer pairs than bands.
    """
    if len(gaps) < order.bands:
        raise DataError(
            f"data.scores.order has {order.bands} bands, and there are {len(gaps)} pairs: take "
            f"fewer bands"
        )
    sign = -1 if order.first == "large_gap" else 1
    places = np.empty(len(gaps), dtype=np.int64)
    places[np.argsort(sign * gaps, kind="stable")] = np.arange(len(gaps))
    return places * order.bands // len(gaps)


def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Sizes of about resolution^2 pixels, sides from half to twice the resolution.

    Steps are a sixteenth of the resolution, at least 8: 64 pixels at 1024, as in SDXL
    (arXiv:2307.01952, appendix I). The longer side takes every step, the shorter one is the
    largest that keeps the area; each size comes upright and lying.

    Returns:
        (height, width), from the widest to the tallest.
    """
    step = max(8, resolution // 16 // 8 * 8)
    sizes = set()
    for long in range(resolution, 2 * resolution + 1, step):
        short = max(step, resolution**2 // long // step * step)
        sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size[0])))


def nearest_bucket(sizes: tuple[Size, ...], images: tuple[Size, ...]) -> int:
    """Index of the size whose aspect ratio is nearest to the images' geometric mean."""
    aspect = sum(math.log(width / height) for height, width in images) / len(images)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - aspect))
