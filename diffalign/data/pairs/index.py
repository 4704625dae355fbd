"""Which pairs go into which aspect-ratio bucket, from the headers of their images."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from diffalign.data.decoding import BadImageError, upright_size
from diffalign.data.indexed import Index
from diffalign.data.location import OpenedData
from diffalign.data.pairs.records import LeftOut, Skipped
from diffalign.data.pairs.transforms import Size, bucket_sizes, nearest_bucket
from diffalign.data.rows import AbstractRows, Row
from diffalign.data.skipping import SkipLog
from diffalign.data.source import DataConfig
from diffalign.errors import DataError


def assign_buckets(
    data: OpenedData, index: Index, config: DataConfig, skips: SkipLog
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


def _shapes(data: OpenedData, row: Row, max_pixels: int) -> tuple[Size, ...] | Skipped:
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
