"""Parquet files and hub data sets through the datasets library, memory-mapped or streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from diffalign.data.columns import PairColumns
from diffalign.data.reading import Location
from diffalign.data.rows import AbstractRows, AbstractRowStream, Cursor, Row
from diffalign.data.source import DataConfig
from diffalign.errors import DataError

_HEADER_BYTES = 1 << 16
"""Enough for the size of nearly every image; the others are read whole."""


def _row_name(index: int) -> str:
    return f"row-{index:08d}"


def _without_decoding(dataset: Any, columns: Sequence[str]) -> Any:
    """Only these columns, with images as the {bytes, path} they are stored as."""
    dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


class TableRows(AbstractRows):
    """A memory-mapped Arrow table: a row is read when asked for."""

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str]) -> None:
        self._dataset = _without_decoding(dataset, columns)
        self._arrow = self._dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return Row(_row_name(index), self._dataset[index])

    def start_of(self, index: int) -> Row:
        table = self._arrow[index]
        values = {name: _start_of(table[name][0]) for name in table.column_names}
        return Row(_row_name(index), values)

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        light = self._arrow.select_columns(list(dict.fromkeys(columns)))
        index = 0
        for table in light.iter(batch_size=10_000):
            for values in table.to_pylist():
                yield Row(_row_name(index), values)
                index += 1


def _start_of(value: pa.Scalar) -> Any:
    """A value of which only the first bytes, if it is an image, are brought in from disk."""
    if isinstance(value, pa.StructScalar) and "bytes" in value:
        start = _start_of(value["bytes"])
        return start if start is not None else value.as_py()
    if isinstance(value, (pa.BinaryScalar, pa.LargeBinaryScalar)) and value.is_valid:
        return memoryview(value.as_buffer())[:_HEADER_BYTES].tobytes()
    return value.as_py()


class TableStream(AbstractRowStream):
    """Parquet files one after another; a cursor is the library's own position."""

    def __init__(self, dataset: datasets.IterableDataset, columns: Sequence[str]) -> None:
        self._dataset = _without_decoding(dataset, columns)

    def blocks(self, size: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, list[Row]]]:
        dataset = copy.deepcopy(self._dataset)  # iterating leaves its position in shared parts
        number = 0
        if start is not None:
            number = start["row"]
            dataset.load_state_dict(copy.deepcopy(start["position"]))
        rows = iter(dataset)
        position = start["position"] if start is not None else None
        while True:
            block = [
                Row(_row_name(number + offset), values)
                for offset, values in enumerate(islice(rows, size))
            ]
            if not block:
                return
            yield {"row": number, "position": position}, block
            number += len(block)
            position = dataset.state_dict()


def table_columns(location: Location, config: DataConfig) -> tuple[str, ...]:
    """Column names from the schema of the first file, or of the hub's description."""
    if location.files:
        try:
            return tuple(pyarrow.parquet.read_schema(location.files[0]).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{location.files[0]} is no readable parquet file: {error}") from error
    dataset = _load(location, config, streaming=True)
    return tuple(dataset.column_names or next(iter(dataset)))


def open_table(
    location: Location, columns: PairColumns, config: DataConfig
) -> TableRows | TableStream:
    """The rows of parquet files or of a hub data set, as `config.streaming` says.

    Map-style parquet is converted once to the library's Arrow cache (HF_DATASETS_CACHE), which
    takes the size of the data again.
    """
    dataset = _load(location, config, streaming=config.streaming)
    rows_type = TableStream if config.streaming else TableRows
    return rows_type(dataset, columns.all())


def _load(location: Location, config: DataConfig, *, streaming: bool) -> Any:
    if location.files:
        files = [str(file) for file in location.files]
        arguments: dict[str, Any] = {"path": "parquet", "data_files": files, "split": "train"}
    else:
        arguments = {"path": config.path, "split": config.split, "revision": config.revision}
    try:
        return datasets.load_dataset(**arguments, streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        where = "" if location.files else " (no file or folder here either)"
        cause = error.__cause__ or error
        raise DataError(f"data.path {config.path}{where}: {cause}") from error
