"""Files of scores: one row per image and prompt, with the scorer that gave them.

A score belongs to the content of an image and its prompt, not to a row of a data set, so that data
may be cut, mixed and moved. The file is parquet: columns `image` (SHA-256 of the file), `prompt`,
`score` and `deviation`; of an image that could not be scored `problem` says why. Its metadata holds
the scorer. Next to generated images it is JSON lines instead, each with the scorer's fingerprint,
under the name of the scorer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from diffalign.data.decoding import EncodedImage
from diffalign.errors import DataError
from diffalign.files import read_rows, replacing_file, sha256_of, to_json, writing
from diffalign.parsing import checked, parse_json

_KEY = b"diffalign.scores"
_NAMES = ("image", "prompt", "score", "deviation", "problem")
_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("score", pa.float64()),
        ("deviation", pa.float64()),
        ("problem", pa.string()),
    ]
)

ScoreKey = tuple[str, str]
"""SHA-256 of the image, prompt."""


@dataclass(frozen=True, kw_only=True)
class ScorerIdentity:
    """Who scored, and how."""

    kind: str
    """Of the scorer, as a config names it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the scorer, its revision among them where it has one: plain JSON values."""
    fingerprint: str
    """Equal ones give equal scores for equal images."""
    repeats: int = 1
    """Of how many copies of an image a score is the mean."""
    perturbation: Mapping[str, Any] | None = None
    """What the copies were made by; None where there is one."""

    @property
    def whole_fingerprint(self) -> str:
        """Equal ones give equal rows for equal images."""
        if self.repeats == 1:
            return self.fingerprint
        return f"{self.fingerprint}, {self.repeats} copies by {to_json(self.perturbation)}"


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A row of the file."""

    image: str
    """SHA-256 of the image."""
    prompt: str
    score: float | None
    """Mean over the copies; None where the image could not be scored."""
    deviation: float | None = None
    """Standard deviation over the copies, of n - 1; None where there is one."""
    problem: str | None = None
    """Why there is no score."""

    @property
    def key(self) -> ScoreKey:
        """What it is the score of."""
        return self.image, self.prompt


@dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    """The content of a file."""

    path: Path
    scorer: ScorerIdentity
    rows: Mapping[ScoreKey, ScoreRow]

    @property
    def has_deviations(self) -> bool:
        """Whether scores have a standard deviation."""
        return self.scorer.repeats > 1

    def digest(self) -> str:
        """Another one for another file."""
        return sha256_of(self.path)[:16]


def digest_of(image: EncodedImage) -> str | None:
    """The SHA-256 of a file or its content; None where there is no such file.

    Args:
        image: as a column of a data set holds it.
    """
    if image is None:
        return None
    try:
        content = image.read_bytes() if isinstance(image, Path) else image
    except OSError:
        return None
    return hashlib.sha256(content).hexdigest()


def write_score_column(path: Path, scorer: ScorerIdentity, rows: Sequence[ScoreRow]) -> None:
    """Write a file, whole or not at all.

    Raises:
        DataError: the disk refuses.
    """
    table = pa.table(
        {name: [getattr(row, name) for row in rows] for name in _NAMES}, schema=_SCHEMA
    ).replace_schema_metadata({_KEY: json.dumps(asdict(scorer)).encode()})
    with writing(path), replacing_file(path) as draft:
        pyarrow.parquet.write_table(table, draft)


def read_score_column(path: Path) -> ScoreColumn:
    """Read a file.

    Raises:
        DataError: it is not there, or is no file of scores.
    """
    if path.suffix == ".jsonl":
        return _read_lines(path)
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file. `diffalign score data.path=DATA scorer.kind=KIND "
            f"output=FOLDER` writes FOLDER/KIND.parquet"
        )
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no parquet file of scores that can be read: {error}") from error
    metadata = (table.schema.metadata or {}).get(_KEY)
    missing = [name for name in _NAMES if name not in table.column_names]
    if metadata is None or missing:
        lacks = "no scorer in its metadata" if metadata is None else f"no {', '.join(missing)}"
        raise DataError(
            f"{path} is no file of scores: it has {lacks}. It is written by `diffalign score "
            f"data.path=DATA`; columns of numbers next to the images are named under "
            f"data.strength.columns"
        )
    where = f"{path}: its metadata"
    scorer = checked(ScorerIdentity, parse_json(metadata, where), where)
    try:
        columns = table.select(list(_NAMES)).cast(_SCHEMA).to_pydict()
    except pa.ArrowException as error:
        raise DataError(f"{path} is no file of scores: {error}") from error
    rows = {}
    for values in zip(*(columns[name] for name in _NAMES), strict=True):
        row = ScoreRow(**dict(zip(_NAMES, values, strict=True)))
        _check(row, path)
        rows[row.key] = row
    return ScoreColumn(path=path, scorer=scorer, rows=rows)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line next to generated images."""

    image: str
    prompt: str
    fingerprint: str
    score: float
    deviation: float | None = None


def _read_lines(path: Path) -> ScoreColumn:
    """The file of scores next to generated images."""
    lines = read_rows(_Line, path) if path.is_file() else []
    if not lines:
        raise DataError(
            f"{path}: there are no scores. `diffalign score images=FOLDER scorer.kind=KIND` writes "
            f"FOLDER/scores/KIND.jsonl"
        )
    rows = [
        ScoreRow(image=each.image, prompt=each.prompt, score=each.score, deviation=each.deviation)
        for each in lines
    ]
    scorer = ScorerIdentity(kind=path.stem, fingerprint=lines[0].fingerprint)
    return ScoreColumn(path=path, scorer=scorer, rows={row.key: row for row in rows})


def _check(row: ScoreRow, path: Path) -> None:
    """Raise DataError for a row that says nothing."""
    if row.image is None or row.prompt is None:
        raise DataError(f"{path}: a row has no image or no prompt, and a score is of both")
    for name in ("score", "deviation"):
        value = getattr(row, name)
        if value is not None and not math.isfinite(value):
            raise DataError(
                f"{path}: the {name} of {row.prompt!r:.60} is {value}, and must be a finite number"
            )
