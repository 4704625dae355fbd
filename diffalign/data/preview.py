"""A look at a data set before anything is trained: counts, the mapping, the first pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice

from diffalign.data.decoding import BadImageError, decode
from diffalign.data.indexed import index_rows
from diffalign.data.reading import OpenedData, locate, open_data
from diffalign.data.records import EncodedImage, ImagePair
from diffalign.data.rows import AbstractRows, AbstractRowStream
from diffalign.data.skipping import SkipLog
from diffalign.data.source import DataConfig
from diffalign.data.transforms import Size
from diffalign.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    """One pair as the loader would see it."""

    sample_id: str
    prompt: str
    chosen: Size | str
    """(height, width), or why the image cannot be used."""
    rejected: Size | str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `--dry-run` shows of the data."""

    lines: list[str]
    """How the data is read, and what its rows are, as sentences."""
    rows: list[PreviewRow]


def preview(config: DataConfig, n: int) -> Preview:
    """Open the data set as training would, and decode its first `n` pairs.

    A hub data set is streamed for this, so that nothing large is downloaded; its rows are then
    not counted.

    Raises:
        DataError: whatever would stop the training before its first step.
    """
    if locate(config).root is None:
        config = dataclasses.replace(config, streaming=True, buckets=False)
    data = open_data(config)
    if isinstance(data.rows, AbstractRowStream):
        lines, pairs = ["rows are counted as they are read"], _first_of_stream(data, n)
    else:
        lines, pairs = _first_of_index(data, n, config)
    rows = [
        PreviewRow(
            sample_id=pair.sample_id,
            prompt=pair.prompt,
            chosen=_size(pair.chosen, config),
            rejected=_size(pair.rejected, config),
        )
        for pair in pairs
    ]
    return Preview(lines=[data.summary, *lines], rows=rows)


def _first_of_stream(data: OpenedData, n: int) -> list[ImagePair]:
    assert isinstance(data.rows, AbstractRowStream)
    pairs = (data.columns.pair(row, data.base) for _, row in data.rows.rows())
    found = list(islice((pair for pair in pairs if isinstance(pair, ImagePair)), n))
    if n and not found:
        raise DataError(f"{data.summary}: no row holds a preference")
    return found


def _first_of_index(
    data: OpenedData, n: int, config: DataConfig
) -> tuple[list[str], list[ImagePair]]:
    assert isinstance(data.rows, AbstractRows)
    skips = SkipLog(None)
    index = index_rows(data.rows, data.columns, limit=config.limit, skips=skips)
    skips.stop_above(config.max_bad_fraction, out_of=index.counts.pairs)
    lines = [index.counts.describe()]
    if len(skips):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skips.counts.items())
        lines.append(f"skipped so far: {counts}")
    found = (data.columns.pair(data.rows[int(row)], data.base) for row in index.members[:n])
    return lines, [pair for pair in found if isinstance(pair, ImagePair)]


def _size(image: EncodedImage, config: DataConfig) -> Size | str:
    try:
        decoded = decode(image, max_pixels=config.max_pixels)
    except BadImageError as error:
        return f"{error.reason.value}: {error.detail}"
    return decoded.height, decoded.width
