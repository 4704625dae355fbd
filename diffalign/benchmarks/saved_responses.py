"""Responses that a model gave earlier, and the files that benchmarks publish, read from JSON.

A file is a list of objects or one object a line; whichever it is shows in its first character, for
published files are called `.json` either way.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.responses.coco import KnownIds
from diffalign.errors import DataError
from diffalign.files import parse_json_line, read_text
from diffalign.parsing import parse_json, shortly

IMAGE_KEYS = ("image_id", "image", "image_path", "file_name")
"""Names of an image in saved responses; the first that a row has is taken."""
RESPONSE_KEYS = ("answer", "response", "caption", "text")
"""Names of responses in POPE, AMBER, CHAIR and LLaVA; the first that a row has is taken."""


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of a file with one object a line; blank lines are left out.

    Raises:
        DataError: there is no such file, it holds no object, or something else than objects.
    """
    text = read_text(path)
    is_list = text.lstrip().startswith("[")
    rows = parse_json(text, path) if is_list else _lines(text, path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {number} must be an object, got {shortly(row)}")
    if not rows:
        raise DataError(f"{path}: holds nothing")
    return rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table: `.tsv` or `.csv` with a heading, `.parquet`, or as for `read_objects`.

    Columns of a parquet file that hold images are left out.

    Raises:
        DataError: there is no such file, or it holds no row.
    """
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".parquet"):
        return read_objects(path)
    if kind == ".parquet":
        rows = _parquet_rows(path)
    else:
        csv.field_size_limit(2**31 - 1)  # images as base64
        separator = "\t" if kind == ".tsv" else ","
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=separator))
    if not rows:
        raise DataError(f"{path}: holds nothing")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        file = pq.ParquetFile(path)
        names = [
            field.name
            for field in file.schema_arrow
            if not pa.types.is_struct(field.type) and not pa.types.is_binary(field.type)
        ]
        rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a parquet file: {error}") from error
    return rows


def responses_to(
    path: Path, ids: Sequence[str], *, keys: Sequence[str] = RESPONSE_KEYS
) -> dict[str, str]:
    """Responses by the id of their question, in the order of the questions.

    A row has a question_id and the response under one of `keys`. Where no row has an id, row n
    answers question n, and there must be as many.

    Args:
        path: JSON lines or a JSON list.
        ids: of the questions, in their order.
        keys: names of the response.

    Raises:
        DataError: a response is to no question, a question has two, or ids are missing in part.
    """
    rows = read_objects(path)
    with_id = [row for row in rows if "question_id" in row]
    if with_id and len(with_id) < len(rows):
        raise DataError(
            f"{path}: {len(rows) - len(with_id)} of {len(rows)} responses have no question_id; "
            "give it to all of them, or to none where they stand in the order of the questions"
        )
    if not with_id and len(rows) != len(ids):
        raise DataError(
            f"{path}: {len(rows)} responses without question_id to {len(ids)} questions: "
            "which belongs to which cannot be known; give each response the question_id"
        )
    known = KnownIds(ids)
    placed = (
        [known.find(row["question_id"]) or str(row["question_id"]) for row in rows]
        if with_id
        else list(ids)
    )
    refuse_repeated(placed, path)
    texts = {
        question_id: text_of(row, keys, path=path, number=number)
        for number, (question_id, row) in enumerate(zip(placed, rows, strict=True), start=1)
    }
    unknown = [question_id for question_id in placed if known.find(question_id) is None]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} responses are to questions that are not there, for example "
            f"question_id {', '.join(unknown[:5])}; the questions have {known.examples()}; give "
            f"the responses to these very questions"
        )
    return {question_id: texts[question_id] for question_id in ids if question_id in texts}


def refuse_repeated(ids: Sequence[str], path: Path) -> None:
    """Raise DataError where the id of a question stands more than once."""
    repeated = [question_id for question_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} question_ids stand more than once, for example "
            f"{', '.join(repeated[:5])}; one file holds one split, answered once"
        )


def field_of(row: Mapping[str, Any], names: Sequence[str], *, path: Path, number: int) -> Any:
    """The value of the first of several names that a row has.

    Raises:
        DataError: it has none of them.
    """
    for name in names:
        if name in row:
            return row[name]
    raise DataError(
        f"{path}: item {number} has no key {' or '.join(names)} (keys: {', '.join(row)})"
    )


def text_of(row: Mapping[str, Any], names: Sequence[str], *, path: Path, number: int) -> str:
    """`field_of`, for what must be text."""
    value = field_of(row, names, path=path, number=number)
    if not isinstance(value, str):
        raise DataError(
            f"{path}: item {number}: {'/'.join(names)} must be text, got {shortly(value)}"
        )
    return value


def image_id_of(row: Mapping[str, Any], *, path: Path, number: int) -> str:
    """The image that a response is about: its id, or the name of its file.

    Raises:
        DataError: it says none.
    """
    value = field_of(row, IMAGE_KEYS, path=path, number=number)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(
            f"{path}: item {number}: {'/'.join(IMAGE_KEYS)} must be a number or the name of a "
            f"file, got {shortly(value)}"
        )
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def known_image_ids(ids: Sequence[str], known: KnownIds, *, path: Path, truth: Path) -> list[str]:
    """The ids in the spelling of a file of truths, where that has them in any spelling of COCO.

    Raises:
        DataError: it has none of them.
    """
    found = [known.find(image_id) for image_id in ids]
    if not any(name is not None for name in found):
        raise DataError(
            f"{path}: {truth} knows none of its {len(ids):,} images: it has {known.examples()}, "
            f"and the responses are about {', '.join(dict.fromkeys(ids[:5]))}"
        )
    return [image_id if name is None else name for image_id, name in zip(ids, found, strict=True)]


def empty_notes(responses: Sequence[str]) -> list[str]:
    """A note where some responses are empty: whatever is counted of them, nobody said anything."""
    empty = sum(not response.strip() for response in responses)
    if not empty:
        return []
    all_of_them = " The figures say nothing about a model." * (empty == len(responses))
    return [f"{empty:,} of {len(responses):,} responses are EMPTY.{all_of_them}"]


def _lines(text: str, path: Path) -> list[Any]:
    return [
        parse_json_line(line, path, number)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
