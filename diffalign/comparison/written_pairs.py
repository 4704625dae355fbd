"""Pairs of scored images as a data set: Pick-a-Pic's columns, the scores, and how they came to be.

The content of an image is what its file holds. The one with the smaller digest comes first, so that
neither place is the better one. `label_0` and `label_1` say who won by the score;
`preference_0` is the probability of the first where a temperature was given, `NAME_0` and `NAME_1`
are the scores, and `votes_0` and `votes_1` of how many scorers prefer which. The metadata of the
file holds the provenance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from diffalign.comparison.scored_images import Candidate, ScoredSource
from diffalign.data.strength.gap import sigmoid
from diffalign.errors import DataError
from diffalign.files import replacing_file, writing
from diffalign.generation.manifest import file_digest
from diffalign.pair_rules.base import Pair
from diffalign.parsing import parse_json

PROVENANCE = b"diffalign.prefer"
"""Key of the file's metadata."""

_ROWS = 50
"""Of a row group: one is in memory as a whole where the data is streamed."""

_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("caption", pa.string()),
    ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()),
    ("label_0", pa.float64()),
    ("label_1", pa.float64()),
    ("has_label", pa.bool_()),
    ("ranking_id", pa.int64()),
    ("image_0_uid", pa.string()),
    ("image_1_uid", pa.string()),
    ("num_example_per_prompt", pa.int64()),
)
"""Of Pick-a-Pic, with its types."""


@dataclass(frozen=True)
class MadePair:
    """Two images of a prompt, the preferred one first."""

    better: Candidate
    other: Candidate
    of_prompt: int
    """How many pairs the prompt has."""


def made_pairs(source: ScoredSource, pairs: Mapping[str, Sequence[Pair]]) -> list[MadePair]:
    """The pairs of all prompts, in order.

    Args:
        source: of the images.
        pairs: of each prompt, as a rule has them.
    """
    return [
        MadePair(source.members(prompt)[i], source.members(prompt)[j], len(of_prompt))
        for prompt, of_prompt in pairs.items()
        for i, j in of_prompt
    ]


def write_pairs(
    path: Path,
    source: ScoredSource,
    pairs: Sequence[MadePair],
    provenance: Mapping[str, Any],
    *,
    temperature: float | None,
) -> None:
    """Write a data set, whole or not at all.

    Args:
        path: of the parquet file.
        source: of the images and scores.
        pairs: at least one.
        provenance: plain JSON values.
        temperature: gap of scores at which the odds are e to 1; None writes no probability.

    Raises:
        DataError: an image is gone, or has changed since it was scored; or the disk refuses.
    """
    names = list(source.columns)
    votes = [("votes_0", pa.int64()), ("votes_1", pa.int64())] if len(names) > 1 else []
    scores = [(f"{name}_{side}", pa.float64()) for name in names for side in (0, 1)]
    soft = [] if temperature is None else [("preference_0", pa.float64())]
    known = [name for name, _ in _FIELDS]
    for name, _ in (*soft, *votes, *scores):
        if known.count(name) or name.startswith(("jpg_", "image_")):
            raise DataError(
                f"a score is called {name[:-2]}, and {name} is a column of Pick-a-Pic: call it "
                f"otherwise under scores"
            )
        known.append(name)
    metadata = {PROVENANCE: json.dumps(provenance).encode()}
    schema = pa.schema([*_FIELDS, *soft, *votes, *scores]).with_metadata(metadata)
    with (
        writing(path),
        replacing_file(path) as draft,
        pyarrow.parquet.ParquetWriter(draft, schema, compression="zstd") as writer,
    ):
        for start in range(0, len(pairs), _ROWS):
            some = enumerate(pairs[start : start + _ROWS], start)
            rows = [_row(source, pair, number, temperature) for number, pair in some]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(
    source: ScoredSource, pair: MadePair, number: int, temperature: float | None
) -> dict[str, Any]:
    sides = sorted((pair.better, pair.other), key=lambda side: side.key)
    numbers = [source.numbers(side.key) for side in sides]
    label = float(sides[0] is pair.better)
    row: dict[str, Any] = {
        "caption": sides[0].key[1],
        "label_0": label,
        "label_1": 1 - label,
        "has_label": True,
        "ranking_id": number,
        "num_example_per_prompt": pair.of_prompt,
    }
    for side in (0, 1):
        row[f"jpg_{side}"] = _content(sides[side])
        row[f"image_{side}_uid"] = sides[side].key[0]
        row |= {f"{name}_{side}": numbers[side][name] for name in source.columns}
        row[f"votes_{side}"] = sum(
            numbers[side][name] > numbers[1 - side][name] for name in source.columns
        )
    if temperature is not None:
        gap = numbers[0][source.by] - numbers[1][source.by]
        row["preference_0"] = sigmoid(gap / temperature)
    return row


def _content(candidate: Candidate) -> bytes:
    digest, prompt = candidate.key
    try:
        content = candidate.read()
    except OSError as error:
        raise DataError(f"an image of {prompt!r:.60} cannot be read: {error}") from error
    if file_digest(content) != digest:
        raise DataError(
            f"an image of {prompt!r:.60} has changed while pairs were made of it (SHA-256 "
            f"{digest[:12]} before): start again"
        )
    return content


def read_provenance(path: Path) -> Any:
    """How the pairs of a file came to be; None where it does not say."""
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    found = metadata.get(PROVENANCE)
    return None if found is None else parse_json(found, f"{path}: its metadata")
