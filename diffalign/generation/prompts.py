"""The prompts of an evaluation: from a list of a config, from a file or from a published set, each
with a stable name and what it is filed under."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError
from diffalign.files import numbered_lines, parse_json_line, read_json, read_text
from diffalign.generation.prompt_sets.base import AbstractPromptSet, find_set, recognised
from diffalign.parsing import shortly
from diffalign.ranges import AtLeast, Ranged

_COLUMNS = ("prompt", "caption", "text", "prompts")
"""Names of the column that holds the prompt, in any case, the first found wins."""
_SLUG_LETTERS = 40
_ABSENT = "there is no such prompt file"


@dataclass(frozen=True)
class Prompt:
    """One text to generate."""

    text: str
    categories: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What it is filed under: kind of category, such as `challenge` -> category."""

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
    `.jsonl` or a `.json` list of objects with such a key, or a `.json` list of texts; or the folder
    of a set that has several files."""
    texts: tuple[str, ...] = ()
    """The prompts themselves."""
    set: str = "auto"
    """The published set that the file is: parti_prompts, geneval, hpdv2 or drawbench. Its prompts
    are then counted, so that half a file is refused, and results are reported by its categories.
    auto recognises it by its columns and counts nothing; plain takes the prompts alone."""
    categories: tuple[str, ...] = ()
    """Columns of a file of your own by which results are reported."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Use the first so many only; null uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.file is None) == (not self.texts):
            raise ValueError("give either file or texts: the prompts come from one of them")
        if self.file is None and (self.set != "auto" or self.categories):
            raise ValueError("set and categories are of a file: leave them out, or give file")
        if self.categories and self.set not in ("auto", "plain"):
            raise ValueError(
                f"the categories of {self.set} are its own: leave out categories, or set=plain"
            )
        if self.set not in ("auto", "plain"):
            find_set(self.set)


def read_prompts(config: PromptsConfig | Path) -> list[Prompt]:
    """Prompts in the order of their source; blank and repeated ones are left out.

    Args:
        config: which prompts, or just the file that holds them.

    Raises:
        DataError: the file is missing, of an unknown kind, has no prompt column, or no prompt.
    """
    config = PromptsConfig(file=config) if isinstance(config, Path) else config
    source = config.file or "prompts.texts"
    every = [Prompt(text) for text in config.texts] if config.file is None else _of_file(config)
    unique: dict[str, Prompt] = {}
    for prompt in every:
        if text := prompt.text.strip():
            unique.setdefault(text, Prompt(text, prompt.categories))
    if not unique:
        raise DataError(f"{source}: holds no prompt")
    return list(unique.values())[: config.limit]


@dataclass(frozen=True)
class _Row:
    """A prompt as it stands in a file."""

    text: str
    columns: Mapping[str, Any]
    """By their names in lower case; empty of a line or of a text in a list."""
    file: Path
    place: str
    """Such as `line 3`."""


def _of_file(config: PromptsConfig) -> list[Prompt]:
    assert config.file is not None
    known = None if config.set in ("auto", "plain") else find_set(config.set)
    rows = [row for path in _files(config.file, known) for row in _read(path)]
    if config.set == "auto" and not config.categories and rows:
        known = recognised(rows[0].columns.keys(), rows[0].file)
    if config.set not in ("auto", "plain"):
        assert known is not None
        _check_set(config.file, config.set, known, rows)
    if known is None:
        return [Prompt(row.text, _own_categories(row, config.categories)) for row in rows]
    lacking = next((row for row in rows if not known.columns <= row.columns.keys()), None)
    if lacking is not None:
        raise DataError(
            f"{lacking.file}: {lacking.place}: lacks "
            f"{', '.join(sorted(known.columns - lacking.columns.keys()))}"
        )
    return [Prompt(row.text, known.categories(row.columns, row.file)) for row in rows]


def _files(path: Path, known: AbstractPromptSet | None) -> Sequence[Path]:
    """The file, or those of a folder of a published set."""
    if not path.is_dir():
        return [path]
    names = known.files if known is not None else ()
    if known is None and (found := recognised((), _first_json(path))) is not None:
        names = found.files
    there = [path / name for name in names if (path / name).is_file()]
    if not there:
        raise DataError(
            f"{path}: is a folder, and prompts are read from a file"
            + (f" (of this set: {', '.join(names)})" if names else "")
        )
    return there


def _first_json(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.json"))), folder)


def _check_set(path: Path, name: str, known: AbstractPromptSet, rows: Sequence[_Row]) -> None:
    """Raise where a file is not the set that it is said to be, whole."""
    first = rows[0] if rows else None
    if first is not None and not known.recognises(first.columns.keys(), first.file):
        needed = ", ".join(sorted(known.columns) or known.files)
        raise DataError(
            f"{path}: is not {name}, which has {'columns' if known.columns else 'files'} {needed}; "
            f"leave out prompts.set to read it as it is"
        )
    if len(rows) != known.size:
        raise DataError(
            f"{path}: holds {len(rows):,} prompts, and {name} has {known.size:,}: fetch it again, "
            f"or leave out prompts.set to use these"
        )


def _own_categories(row: _Row, names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if name.lower() not in row.columns:
            raise DataError(
                f"{row.file}: {row.place}: no column named {name}, which prompts.categories names "
                f"(columns: {', '.join(row.columns) or 'none'})"
            )
    return {name: str(row.columns[name.lower()]) for name in names}


def _read(path: Path) -> list[_Row]:
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


def _lines(path: Path) -> Iterator[_Row]:
    for number, line in numbered_lines(path, absent=_ABSENT):
        yield _Row(line, {}, path, f"line {number}")


def _table(path: Path) -> Iterator[_Row]:
    text = io.StringIO(read_text(path, absent=_ABSENT), newline="")
    try:
        if path.suffix == ".tsv":
            rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(text)
        column = _prompt_column(rows.fieldnames or (), path)
        for row in rows:
            yield _Row(row[column] or "", _lower(row), path, f"line {rows.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is no row of a table: {error}") from error


def _json_lines(path: Path) -> Iterator[_Row]:
    for number, line in numbered_lines(path, absent=_ABSENT):
        row = parse_json_line(line, path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} must be an object with a key named prompt")
        yield _of_object(row, path, f"line {number}")


def _json_list(path: Path) -> Iterator[_Row]:
    rows = read_json(path, absent=_ABSENT)
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise DataError(f"{path}: must be a list of prompts, or of objects with a key named prompt")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            yield _Row(row, {}, path, f"item {number}")
        else:
            yield _of_object(row, path, f"item {number}")


def _of_object(row: Mapping[str, Any], path: Path, place: str) -> _Row:
    column = _prompt_column(row, path)
    value = row[column]
    if not isinstance(value, (str, type(None))):
        raise DataError(f"{path}: {place}: {column} must be text, got {shortly(value)}")
    return _Row(value or "", _lower(row), path, place)


def _lower(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Columns by their names in lower case, without those that a row lacks or has too many."""
    return {
        name.lower(): value
        for name, value in reversed(list(row.items()))
        if isinstance(name, str) and value is not None
    }


def _prompt_column(names: Iterable[str], path: Path) -> str:
    by_lower = {name.lower(): name for name in reversed(list(names))}
    for column in _COLUMNS:
        if column in by_lower:
            return by_lower[column]
    raise DataError(
        f"{path}: no column named {', '.join(_COLUMNS)} (columns: {', '.join(by_lower.values())})"
    )
