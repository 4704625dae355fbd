"""The section `responses.ranking`: pairs left out, or put in order, by one number of each.

A file of numbers is parquet: `sample_id`, and a column for each number; its metadata names the data
and the model. `diffalign precompute CONFIG --scores FILE` writes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError, did_you_mean
from diffalign.files import replacing_file, sha256_of, writing
from diffalign.ranges import AtLeast, Between, Ranged

LABELS = "labels"
"""Name of the gap of the numbers by which a data set says which response is better."""
_KEY = b"diffalign.pair_numbers"
_ID = "sample_id"


@dataclass(frozen=True, kw_only=True)
class RankingConfig(Ranged):
    """Which pairs are trained on, and in which order, by one number of each.

    Sources: Razin et al. 2024, arXiv:2410.08847 (`ches_normalised`, the lowest are kept); Pattnaik
    et al. 2024, arXiv:2403.07230 (Curry-DPO: the largest gap of ratings first, a level at a time).
    """

    by: str
    """The number: a column of the file, such as `ches_normalised` or `difficulty`; or `labels`, the
    gap of the ratings that the data itself has."""
    file: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Parquet that `diffalign precompute CONFIG --scores FILE` wrote; null for `labels`."""
    keep: Annotated[float, Between(0, 1, without=[0])] = 1.0
    """Share of the pairs that are trained on: those that come first. With `ches_normalised` at 0.5
    the half that displaces most is left out."""
    first: Literal["lowest", "highest"] = "lowest"
    """Which pairs come first, by their number."""
    bands: Annotated[int, AtLeast(1)] = 1
    """Bands of equally many pairs, which come one after the other; at 1 those that are kept are
    seen in one random order."""
    passes: Annotated[int, AtLeast(1)] = 1
    """How often the pairs of a band are seen before the next band comes; after the last one the
    first comes again."""
    only: Annotated[int, AtLeast(1)] | None = None
    """Train on this band alone, from 1: one run a band, each from the adapter of the one before
    (`model.lora.start`), has the reference renewed with every band, as Curry-DPO has it. Null takes
    all bands in turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.by == LABELS) != (self.file is None):
            raise ValueError(
                f"by is {self.by} and file is {self.file}: {LABELS} are those of the data, and all "
                f"other numbers are read from the file that `diffalign precompute CONFIG --scores "
                f"FILE` wrote"
            )
        if self.only is not None and self.only > self.bands:
            raise ValueError(f"only is {self.only}, and there are {self.bands} bands")
        if self.keep == 1 and self.bands == 1:
            raise ValueError(
                "ranking leaves nothing out and orders nothing: give keep below 1, or bands"
            )

    def describe(self) -> str:
        """What becomes of the pairs, as the end of a sentence."""
        said = f"ranked by {self.by}, the {self.first} first"
        if self.keep < 1:
            said += f", {self.keep:.0%} of them kept"
        if self.bands > 1:
            said += f", in {self.bands} bands"
        return said + (f", band {self.only} alone" if self.only is not None else "")

    def fingerprint(self) -> str:
        """Another one for other numbers."""
        return "" if self.file is None else sha256_of(self.file)[:16]


@dataclass(frozen=True, kw_only=True)
class NumbersOf:
    """Whose numbers a file has."""

    data: str
    """Fingerprint of the data set."""
    model: Mapping[str, Any]
    """Settings of the model that they were computed under."""


def write_pair_numbers(
    path: Path, about: NumbersOf, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file.
        about: whose numbers they are.
        rows: of each pair its `sample_id` and its numbers.
        names: of the numbers.

    Raises:
        DataError: the disk refuses.
    """
    schema = pa.schema([(_ID, pa.string()), *((name, pa.float64()) for name in names)])
    columns = {name: [row[name] for row in rows] for name in schema.names}
    known = json.dumps({"data": about.data, "model": dict(about.model)}).encode()
    table = pa.table(columns, schema=schema).replace_schema_metadata({_KEY: known})
    with writing(path), replacing_file(path) as draft:
        pyarrow.parquet.write_table(table, draft)


def read_pair_numbers(path: Path, by: str, *, data: str) -> dict[str, float]:
    """One number of each pair, by its id.

    Args:
        path: of the file.
        by: name of the number.
        data: fingerprint of the data set that the pairs are of.

    Raises:
        DataError: it is not there, is no such file, lacks the number, or is of other data.
    """
    command = "diffalign precompute CONFIG --scores FILE"
    if not path.is_file():
        raise DataError(
            f"responses.ranking.file {path}: there is no such file. `{command}` writes one"
        )
    try:
        table = pyarrow.parquet.read_table(path)
        known = json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise DataError(
            f"responses.ranking.file {path} is no file of numbers of pairs, which `{command}` "
            f"writes: {error}"
        ) from error
    names = [name for name in table.column_names if name != _ID]
    if by not in names:
        raise DataError(
            f"responses.ranking.by is {by}, and {path} has {', '.join(names)}."
            f"{did_you_mean(by, names)}"
        )
    if known["data"] != data:
        raise DataError(
            f"responses.ranking.file {path} is of other data than responses.path: compute the "
            f"numbers of this data with `{command}`"
        )
    return dict(zip(table[_ID].to_pylist(), table[by].to_pylist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Which pairs of a list are trained on."""

    kept: np.ndarray
    """Their places in the list, int64 [n], ascending."""
    bands: np.ndarray | None
    """Which band each of them is in, int64 [n] from 0; None where there is one."""
    unknown: int
    """Pairs that have no number, and are left out."""


def ranked(numbers: Sequence[float | None], config: RankingConfig) -> Ranked:
    """Put pairs in order by their numbers; equal ones stay in theirs.

    Args:
        numbers: one a pair; None, or one that is not finite, where nobody knows it.
        config: what is kept, and how many bands there are.

    Raises:
        DataError: no pair has a number, or a band would be empty.
    """
    values = np.array([math.nan if number is None else number for number in numbers], dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        raise DataError(
            f"responses.ranking is by {config.by}, and no pair of the data has that number"
        )
    sign = 1 if config.first == "lowest" else -1
    order = known[np.argsort(sign * values[known], kind="stable")]
    order = order[: max(1, round(config.keep * len(order)))]
    if len(order) < config.bands:
        raise DataError(
            f"responses.ranking has {config.bands} bands, and {len(order)} pairs are kept: take "
            f"fewer bands, or keep more"
        )
    bands = np.arange(len(order)) * config.bands // len(order)
    if config.only is not None:
        order, bands = order[bands == config.only - 1], np.zeros(0, dtype=np.int64)
    several = config.bands > 1 and config.only is None
    places = np.argsort(order, kind="stable")
    return Ranked(
        kept=order[places],
        bands=bands[places] if several else None,
        unknown=len(values) - len(known),
    )
