"""The list of what was drawn: one line of JSON a picture, appended as pictures are finished.

Every line says how its picture was made, so a folder of pictures explains itself, and a later run
knows both what is missing and whether it would draw it the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffalign.errors import DataError

MANIFEST = "manifest.jsonl"

ItemKey = tuple[str, str, int]
"""Model, prompt id, seed."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One picture."""

    model: str
    """The name that the config gave the model."""
    prompt: str
    prompt_id: str
    seed: int
    file: str
    """Relative to the manifest's folder, with forward slashes."""
    sha256: str
    """Of the file's bytes."""
    fingerprint: str
    """Of the model's weights."""
    sampler: Mapping[str, Any]
    """Everything else that shaped the picture."""

    @property
    def key(self) -> ItemKey:
        return self.model, self.prompt_id, self.seed


def read_manifest(folder: Path) -> list[ManifestRow]:
    """All rows in the order of drawing; a redrawn picture stands once, as it is now.

    Raises:
        DataError: there is no manifest, or a line of it is not one of ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {MANIFEST} in this folder; diffalign generate writes one"
        )
    names = {field.name for field in fields(ManifestRow)}
    rows = [
        ManifestRow(**checked_row(row, names, path, number))
        for number, row in enumerate(read_json_lines(path), start=1)
    ]
    return list({row.key: row for row in rows}.values())


def append_rows(folder: Path, rows: Iterable[ManifestRow]) -> None:
    """Add rows so that a reader sees each of them whole or not at all."""
    append_json_lines(folder / MANIFEST, (asdict(row) for row in rows))


def file_digest(content: bytes) -> str:
    """The SHA-256 that manifests and score columns know a picture by."""
    return hashlib.sha256(content).hexdigest()


def checked_row(row: Any, names: set[str], path: Path, number: int) -> dict[str, Any]:
    """A line's object, if it has exactly these keys."""
    if not isinstance(row, dict) or set(row) != names:
        raise DataError(
            f"{path}: line {number} must have the keys {', '.join(sorted(names))}; "
            "the file was not written by this version"
        )
    return row


def read_json_lines(path: Path) -> list[Any]:
    """The objects of a file that `append_json_lines` wrote.

    A last line without its end is what a killed process leaves behind; it does not count.
    """
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line an object and wait until the disk has them; an unfinished line is cut first."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        _cut_unfinished_line(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_unfinished_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is, whatever happens, either absent, old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
