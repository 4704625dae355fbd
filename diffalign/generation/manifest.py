"""The list of what was generated: one line of JSON an image, appended as images are finished.

Every line says how its image was made, so a folder of images explains itself, and a later run
knows both what is missing and whether it would generate it the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import DataError
from diffalign.files import append_json_lines, inside, read_rows

MANIFEST = "manifest.jsonl"

ItemKey = tuple[str, str, int]
"""Model, prompt id, seed."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One image."""

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
    """Everything else that shaped the image."""

    @property
    def key(self) -> ItemKey:
        return self.model, self.prompt_id, self.seed


def read_manifest(folder: Path) -> list[ManifestRow]:
    """All rows in the order of generating; a re-generated image is once, as it is now.

    Raises:
        DataError: there is no manifest, or a line of it is not one of ours, or it names a file that
            does not lie in the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {MANIFEST} in this folder; diffalign generate writes one"
        )
    rows = read_rows(ManifestRow, path)
    for row in rows:
        inside(folder, row.file)
    return list({row.key: row for row in rows}.values())


def append_rows(folder: Path, rows: Iterable[ManifestRow]) -> None:
    """Add rows so that a reader sees each of them whole or not at all."""
    append_json_lines(folder / MANIFEST, (asdict(row) for row in rows))


def file_digest(content: bytes) -> str:
    """The SHA-256 that manifests and score columns know an image by."""
    return hashlib.sha256(content).hexdigest()
