"""The finished data set: JSON lines next to their images, or Parquet with the images in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from diffalign.data.responses.questions import Unmade
from diffalign.files import replacing_file, write_json_lines, writing
from diffalign.synthesis.base import Made

Format = Literal["jsonl", "parquet"]
_ROWS_AT_ONCE = 256


def write_pairs(
    folder: Path, made: Sequence[Made], *, format: Format, image_columns: Sequence[str]
) -> Path:
    """Write `pairs.jsonl` or `pairs.parquet`, whole or not at all.

    Args:
        folder: from which names of images start.
        made: the rows, at least one.
        format: JSON lines name images, Parquet holds them.
        image_columns: that hold a name, or a list of them.

    Raises:
        DataError: the disk refuses.
    """
    path = folder / f"pairs.{format}"
    rows = [{"id": row.sample_id, **row.values} for row in made]
    if format == "jsonl":
        write_json_lines(path, rows)
        return path

    def read(name: str) -> dict[str, Any]:
        return {"bytes": (folder / name).read_bytes(), "path": Path(name).name}

    blank = [_with_images(r, image_columns, lambda _: {"bytes": b"", "path": ""}) for r in rows]
    schema = pa.Table.from_pylist(blank).schema  # of all rows: the first may have no image
    with writing(path), replacing_file(path) as draft:
        _write_table(draft, (_with_images(r, image_columns, read) for r in rows), schema)
    return path


def write_skipped(folder: Path, unmade: Sequence[Unmade]) -> Path:
    """Write `skipped.jsonl`, one line for each question without a row."""
    path = folder / "skipped.jsonl"
    write_json_lines(
        path,
        ({"id": row.sample_id, "reason": row.reason, "detail": row.detail} for row in unmade),
    )
    return path


def _write_table(path: Path, rows: Iterator[Mapping[str, Any]], schema: pa.Schema) -> None:
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def _with_images(
    row: Mapping[str, Any], columns: Sequence[str], image: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """A row with images in place of their names."""

    def images(value: Any) -> Any:
        return [image(name) for name in value] if isinstance(value, list) else image(value)

    return {name: images(value) if name in columns else value for name, value in row.items()}
