"""The prompts of an evaluation: from a list of a config or from a file, each with a stable name."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError
from diffalign.files import numbered_lines, parse_json_line, read_json, read_text
from diffalign.parsing import shortly
from diffalign.ranges import AtLeast, Ranged

_COLUMNS = ("prompt", "caption", "text")
"""Names of the column that holds the prompt, in any case, the first found wins."""
_SLUG_LETTERS = 40
_ABSENT = "there is no such prompt file"


@dataclass(frozen=True)
class Prompt:
    """One text to generate."""

    text: str

    @property
    def prompt_id(self) -> str:
        """A file name's part: readable words, then a digest of the whole text.

        It depends on nothing but the text, so prompts may be added, removed and reordered between
        runs without any image changing its name.
        """
        words = re.sub(r"[^a-z0-9]+", "-", self.text.lower())[:_SLUG_LETTERS].strip("-")
        digest = hashlib.blake2b(self.text.encode(), digest_size=4).hexdigest()
        return f"{words}-{digest}" if words else digest


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Ranged):
    """Where the prompts come from: a file, or the texts themselves."""

    file: Path | None = field(default=None, metadata=MAY_CHANGE)
    """`.txt` with one prompt a line, `.tsv` or `.csv` with a column named prompt, caption or text,
    or `.jsonl` or a `.json` list of objects with such a key."""
    texts: tuple[str, ...] = ()
    """The prompts themselves."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Use the first so many only; null uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.file is None) == (not self.texts):
            raise ValueError("give either file or texts: the prompts come from one of them")


def read_prompts(config: PromptsConfig | Path) -> list[Prompt]:
    """Prompts in the order of their source; blank and repeated ones are left out.

    Args:
        config: which prompts, or just the file that holds them.

    Raises:
        DataError: the file is missing, of an unknown kind, has no prompt column, or no prompt.
    """
    config = PromptsConfig(file=config) if isinstance(config, Path) else config
    source = config.file or "prompts.texts"
    texts = config.texts if config.file is None else _read(config.file)
    clean = (text.strip() for text in texts)
    unique = [Prompt(text) for text in dict.fromkeys(clean) if text]
    if not unique:
        raise DataError(f"{source}: holds no prompt")
    return unique[: config.limit]


def _read(path: Path) -> Iterable[str]:
    readers = {
        ".txt": _lines,
        ".tsv": _table,
        ".csv": _table,
        ".jsonl": _json_lines,
        ".json": _json_list,
    }
    if path.suffix not in readers:
        raise DataError(
            f"{path}: prompts are read from {', '.join(readers)}, not from "
            f"{path.suffix or 'a file without an ending'}"
        )
    return list(readers[path.suffix](path))


def _lines(path: Path) -> Iterator[str]:
    return (line for _, line in numbered_lines(path, absent=_ABSENT))


def _table(path: Path) -> Iterator[str]:
    text = io.StringIO(read_text(path, absent=_ABSENT), newline="")
    try:
        if path.suffix == ".tsv":
            rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(text)
        column = _prompt_column(rows.fieldnames or (), path)
        yield from (row[column] or "" for row in rows)
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is no row of a table: {error}") from error


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in numbered_lines(path, absent=_ABSENT):
        row = parse_json_line(line, path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} must be an object with a key named prompt")
        yield _prompt_of(row, path, f"line {number}")


def _json_list(path: Path) -> Iterator[str]:
    rows = read_json(path, absent=_ABSENT)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must be a list of objects with a key named prompt")
    return (_prompt_of(row, path, f"item {number}") for number, row in enumerate(rows, start=1))


def _prompt_of(row: Mapping[str, Any], path: Path, place: str) -> str:
    column = _prompt_column(row, path)
    value = row[column]
    if not isinstance(value, (str, type(None))):
        raise DataError(f"{path}: {place}: {column} must be text, got {shortly(value)}")
    return value or ""


def _prompt_column(names: Iterable[str], path: Path) -> str:
    by_lower = {name.lower(): name for name in reversed(list(names))}
    for column in _COLUMNS:
        if column in by_lower:
            return by_lower[column]
    raise DataError(
        f"{path}: no column named {', '.join(_COLUMNS)} (columns: {', '.join(by_lower.values())})"
    )
