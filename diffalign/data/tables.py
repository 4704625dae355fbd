"""Parquet files and hub data sets through the datasets library, memory-mapped or streamed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet

from diffalign import hub
from diffalign.data.location import DataLocation, Location
from diffalign.data.rows import AbstractRows, AbstractRowStream, Cursor, Row, Schema
from diffalign.data.stores import StoredFile
from diffalign.errors import DataError

_HEADER_BYTES = 1 << 16
"""Enough for the size of nearly every image; the others are read whole."""


_BATCH_ROWS = 16
"""Rows that are turned into Python values at once."""
_BUFFER = 1 << 18
"""Bytes of a column of a parquet file that are read at once."""
_STORE_BUFFER = 1 << 21
"""The same in an object store, where every request takes its time."""
_AT_ONCE = 16
"""Directories of parquet files that are read at the same time."""


def _row_name(index: int) -> str:
    return f"row-{index:08d}"


def _without_decoding(dataset: Any, columns: Sequence[str]) -> Any:
    """Only these columns, with images as the {bytes, path} they are stored as."""
    dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for name, feature in (dataset.features or {}).items():
        encoded = _encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def _encoded(feature: Any) -> Any:
    """The type of a column with the images in it, at any depth, left encoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [_encoded(inner) for inner in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_encoded(feature.feature))
    return feature


class TableRows(AbstractRows):
    """A memory-mapped Arrow table: a row is read when asked for."""

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str]) -> None:
        self._dataset = _without_decoding(dataset, columns)
        self._arrow = self._dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        try:
            values = self._dataset[index]
        except UnicodeDecodeError:
            values = _python_rows(self._arrow[index])[0]
        return Row(_row_name(index), values)

    def start_of(self, index: int) -> Row:
        table = self._arrow[index]
        values = {name: _start_of(table[name][0]) for name in table.column_names}
        return Row(_row_name(index), values)

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        light = self._arrow.select_columns(list(dict.fromkeys(columns)))
        index = 0
        for table in light.iter(batch_size=10_000):
            for values in _python_rows(table):
                yield Row(_row_name(index), values)
                index += 1


def _start_of(value: pa.Scalar) -> Any:
    """A value of which only the first bytes, if it is an image, are brought in from disk."""
    if isinstance(value, pa.StructScalar) and "bytes" in value:
        start = _start_of(value["bytes"])
        return start if start is not None else value.as_py()
    is_bytes = pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)
    if is_bytes and value.is_valid:
        return memoryview(value.as_buffer())[:_HEADER_BYTES].tobytes()
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _python_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Python values by row; a text column that is not all UTF-8 stays bytes, for who reads it."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    except UnicodeDecodeError:
        columns = {name: _with_bytes(table.column(name)) for name in table.schema.names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _with_bytes(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise
        values = column.cast(pa.large_binary()).to_pylist()
    return values


class _Group(NamedTuple):
    """A row group of a parquet file."""

    file: int
    number: int
    """In its file."""
    first: int
    """Number of its first row in the data set."""
    rows: int


class ParquetStream(AbstractRowStream):
    """Parquet files whose row groups are parts; a cursor is a number of rows in one.

    Read with pyarrow itself and through small buffers: the datasets library has Arrow prefetch
    whole files, and memory then grows with the size of a file, or of a row group.
    """

    def __init__(self, files: Sequence[Path | StoredFile], columns: Sequence[str]) -> None:
        self._files = files
        self._columns = list(dict.fromkeys(columns))

    @property
    def about_rows(self) -> int:
        return sum(self.parts)

    def only(self, columns: Sequence[str]) -> ParquetStream:
        return ParquetStream(self._files, columns)

    @cached_property
    def parts(self) -> Sequence[int]:
        return [group.rows for group in self._groups]

    @cached_property
    def held_bytes(self) -> int:
        """Of the largest row group: of a column a page at a time, which often is all of it, as it
        was read and as it was decoded."""
        return max((self._bytes_of(group) for group in self._groups), default=0)

    def _bytes_of(self, group: _Group) -> int:
        directory = self._footers[group.file].row_group(group.number)
        columns = map(directory.column, range(directory.num_columns))
        return sum(
            column.total_compressed_size + column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] in self._columns
        )

    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        group = self._groups[part]
        skip = 0 if start is None else start["row"]
        path = self._files[group.file]
        buffer = _STORE_BUFFER if isinstance(path, StoredFile) else _BUFFER
        footer = self._footers[group.file]
        with (
            _opened(path) as opened,
            pyarrow.parquet.ParquetFile(
                opened, metadata=footer, pre_buffer=False, buffer_size=buffer
            ) as file,
        ):
            missing = set(self._columns) - set(file.schema_arrow.names)
            if missing:
                raise DataError(f"{path} lacks {', '.join(sorted(missing))}, unlike the first")
            batches = file.iter_batches(_BATCH_ROWS, [group.number], self._columns)
            rows = chain.from_iterable(map(_python_rows, batches))
            for number, values in enumerate(islice(rows, skip, None), start=skip):
                yield {"row": number}, Row(_row_name(group.first + number), values)

    @cached_property
    def _footers(self) -> Sequence[pyarrow.parquet.FileMetaData]:
        """The directories of all files: some kilobytes each, and no row."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(_footer, self._files))

    @cached_property
    def _groups(self) -> Sequence[_Group]:
        groups, first = [], 0
        for file, footer in enumerate(self._footers):
            for number in range(footer.num_row_groups):
                rows = footer.row_group(number).num_rows
                if rows:
                    groups.append(_Group(file, number, first, rows))
                first += rows
        return groups


def _footer(file: Path | StoredFile) -> pyarrow.parquet.FileMetaData:
    with _opened(file) as opened:
        return pyarrow.parquet.read_metadata(opened)


@contextmanager
def _opened(file: Path | StoredFile) -> Iterator[Any]:
    """For pyarrow; what goes wrong within is a DataError that names the file."""
    if isinstance(file, StoredFile):
        with file.opened() as opened:
            yield opened
        return
    try:
        yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read to its end: {error}") from error


class HubStream(AbstractRowStream):
    """A hub data set as it arrives; its parts are the shards of the library, and a cursor is the
    library's own position in one."""

    def __init__(
        self, dataset: datasets.IterableDataset, columns: Sequence[str], *, name: str
    ) -> None:
        self._dataset = _without_decoding(dataset, columns)
        self._name = name

    @cached_property
    def parts(self) -> Sequence[int]:
        return [1] * self._dataset.n_shards

    @property
    def held_bytes(self) -> int:
        """Arrow fetches files as a whole; those of the hub have some 500 MB."""
        return 500_000_000

    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        dataset = copy.deepcopy(self._dataset)  # iterating leaves its position in shared parts
        if len(self.parts) > 1:
            dataset = dataset.shard(len(self.parts), part)
        number, position = 0, None
        if start is not None:
            number, position = start["row"], start["position"]
        if position is not None:
            dataset.load_state_dict(copy.deepcopy(position))
        arriving = iter(dataset)
        while (values := self._next(arriving, part, number)) is not None:
            yield {"row": number, "position": position}, Row(self._row_name(part, number), values)
            number += 1
            position = dataset.state_dict()

    def _row_name(self, part: int, number: int) -> str:
        """By its shard, since nobody knows how many rows the ones before have."""
        return _row_name(number) if len(self.parts) == 1 else f"shard-{part:05d}-row-{number:08d}"

    def _next(
        self, arriving: Iterator[dict[str, Any]], part: int, number: int
    ) -> dict[str, Any] | None:
        try:
            return next(arriving, None)
        except Exception as error:  # the errors of its network libraries share no base class
            why = hub.explain(error, self._name, kind="data set", section="data")
            where = "" if len(self.parts) == 1 else f" of shard {part:,}"
            raise DataError(
                f"data.path {self._name}: the hub stopped at row {number:,}{where}: "
                f"{why or f'{type(error).__name__}: {error}'}. Once it can be reached again, "
                "continue the run from its last checkpoint with --resume"
            ) from error


def table_schema(location: Location, config: DataLocation) -> Schema:
    """Columns from the schema of the first file, or of the hub's description."""
    files = location.files or location.stored
    if files:
        try:
            found = _file_schema(files[0])
            types = {field.name: field.type for field in found if _is_list(field.type)}
            fields = {
                name: frozenset(part.name for part in type.value_type)
                for name, type in types.items()
                if pa.types.is_struct(type.value_type)
            }
            return Schema(tuple(found.names), frozenset(types), fields)
        except (OSError, pyarrow.ArrowException) as error:
            kind = files[0].suffix.lower()[1:]
            raise DataError(f"{files[0]} is no readable {kind} file: {error}") from error
    dataset = load_table(location, config, streaming=True)
    if dataset.features is not None:
        lists = [name for name, type in dataset.features.items() if _is_list_feature(type)]
        return Schema(tuple(dataset.features), frozenset(lists))
    first = next(iter(dataset))
    lists = [name for name, value in first.items() if isinstance(value, list)]
    return Schema(tuple(first), frozenset(lists))


def _file_schema(file: Path | StoredFile) -> pa.Schema:
    if isinstance(file, StoredFile):
        with file.opened() as opened:
            return pyarrow.parquet.read_schema(opened)
    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_schema(file)
    with pa.memory_map(str(file)) as source:  # as `save_to_disk` of the datasets library writes
        return pa.ipc.open_stream(source).schema


def _is_list(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    )


def _is_list_feature(feature: Any) -> bool:
    """A list of values; of objects with several fields, the library makes an object of lists."""
    return isinstance(feature, list) or hasattr(feature, "feature")


def open_table(
    location: Location, columns: Sequence[str], config: DataLocation, *, streaming: bool
) -> AbstractRows | AbstractRowStream:
    """The rows of parquet files or of a hub data set, at random or in order.

    Map-style parquet is converted once to the library's Arrow cache (HF_DATASETS_CACHE), which
    takes the size of the data again.
    """
    if not streaming:
        return TableRows(load_table(location, config), columns)
    if location.stored:
        return ParquetStream(location.stored, columns)
    if location.files:
        if location.files[0].suffix.lower() != ".parquet":
            raise DataError(
                f"{location.describe()}: Arrow files need no copy to be read at random: set "
                f"{config.section}.streaming to false"
            )
        return ParquetStream(location.files, columns)
    arriving = load_table(location, config, streaming=True)
    return HubStream(arriving, columns, name=config.path)


def _has_rows(file: Path) -> bool:
    """Whether a parquet file has rows, or cannot be asked; the library refuses one without."""
    try:
        return bool(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException):
        return True


def load_table(location: Location, config: DataLocation, *, streaming: bool = False) -> Any:
    """Files of one kind, or a split of a hub data set, by the datasets library.

    Raises:
        DataError: nothing is there, or it is damaged, or it lies in an object store.
    """
    if location.stored:
        streams = config.section == "data"
        raise DataError(
            f"{location.describe()}, which is read in order and never at random: "
            + ("set data.streaming to true, or copy" if streams else "copy")
            + " the files to this machine"
        )
    if location.files:
        kind = location.files[0].suffix.lower()[1:]
        files = [str(file) for file in location.files if kind != "parquet" or _has_rows(file)]
        if not files:
            raise DataError(f"{location.describe()}: there is no row in it")
        arguments: dict[str, Any] = {"path": kind, "data_files": files, "split": "train"}
    else:
        arguments = {"path": config.path, "split": config.split, "revision": config.revision}
    try:
        with hub.explained(
            config.path,
            kind="data set",
            error=DataError,
            field=f"{config.section}.path",
            section=config.section,
        ):
            return datasets.load_dataset(**arguments, streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        where = "" if location.files else " (no file or folder here either)"
        cause = error.__cause__ or error
        raise DataError(f"{config.section}.path {config.path}{where}: {cause}") from error
