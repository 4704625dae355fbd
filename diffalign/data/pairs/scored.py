"""Scores joined to the rows of a data set: by content of the image and prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign import config as configs
from diffalign.data.decoding import BadImageError, EncodedImage, encoded_image
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.scores import (
    DEVIATION,
    ENSEMBLE,
    ScoreRules,
    ScoresConfig,
    names_read,
    virtual,
)
from diffalign.data.rows import AbstractRows, AbstractRowStream, Cursor, Row, WrappedStream
from diffalign.data.score_columns import ScoreColumn, ScoreKey, digest_of, read_score_column
from diffalign.data.skipping import LeftOut, UnusableRowError
from diffalign.data.strength.base import SCORES
from diffalign.errors import DataError

if TYPE_CHECKING:
    from diffalign.data.pairs.config import PairConfig

_MISSING_NAMED = 3


class ScoreTable:
    """Numbers of images by name, from the files of a section."""

    def __init__(
        self, config: ScoresConfig, columns: Mapping[str, ScoreColumn] | None = None
    ) -> None:
        """Args:
        config: the section.
        columns: the content of its files by name; None reads them.

        Raises:
            DataError: a file is not there, no file of scores, or of another scorer than said.
        """
        self.config = config
        given = {} if columns is None else dict(columns)
        self.columns = given or {name: _opened(name, config) for name in config.columns}
        self._moments = {name: _moments(self.columns[name], name) for name in config.ensemble}

    def number(self, name: str, key: ScoreKey) -> float | None:
        """A score or a deviation of an image; None where there is none."""
        name, deviation, _ = name.partition(DEVIATION)
        if name == ENSEMBLE:
            scaled = [self._scaled(scorer, key) for scorer in self.config.ensemble]
            known = [score for score in scaled if score is not None]
            if len(known) < len(scaled):
                return None
            return statistics.pstdev(known) if deviation else statistics.fmean(known)
        if name not in self.columns:
            return self._scaled(name.partition(",")[0], key)
        row = self.columns[name].rows.get(key)
        if row is None:
            return None
        return row.deviation if deviation else row.score

    def _scaled(self, name: str, key: ScoreKey) -> float | None:
        row = self.columns[name].rows.get(key)
        if row is None or row.score is None:
            return None
        mean, deviation = self._moments[name]
        return (row.score - mean) / deviation

    def all_of(self, name: str) -> list[float]:
        """A score of all images that have it, rising."""
        first = (
            next(iter(self.config.ensemble)) if name == ENSEMBLE else name.partition(DEVIATION)[0]
        )
        numbers = (self.number(name, key) for key in self.columns[first].rows)
        return sorted(number for number in numbers if number is not None)

    def lacking(self, key: ScoreKey) -> list[str]:
        """The columns that know nothing of an image, not even why it has no score."""
        return [name for name, column in self.columns.items() if key not in column.rows]

    def digest(self) -> str:
        """Another one for other files."""
        parts = [f"{name}={column.digest()}" for name, column in sorted(self.columns.items())]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _opened(name: str, config: ScoresConfig) -> ScoreColumn:
    said = config.columns[name]
    column = read_score_column(said.file)
    scorer = column.scorer
    if said.scorer not in (scorer.kind, scorer.fingerprint, scorer.whole_fingerprint):
        raise DataError(
            f"data.scores.columns.{name}: {said.file} holds scores by {scorer.kind} (fingerprint "
            f"{scorer.fingerprint}), and scorer is {said.scorer}: name the file of that scorer, or "
            f"say {scorer.kind}"
        )
    return column


def _moments(column: ScoreColumn, name: str) -> tuple[float, float]:
    """Mean and standard deviation (of n) of a file."""
    scores = [row.score for row in column.rows.values() if row.score is not None]
    deviation = statistics.pstdev(scores) if scores else 0.0
    if not deviation > 0:
        raise DataError(
            f"data.scores.ensemble has {name}, and all scores of {column.path} are equal: they say "
            f"nothing about a preference. Leave it out"
        )
    return statistics.fmean(scores), deviation


def sides_of(
    row: Row, columns: PairColumns, base: Path | None
) -> list[tuple[EncodedImage, BadImageError | None]]:
    """The images of a row, each as a file or its content, or why it is none."""
    found: list[tuple[EncodedImage, BadImageError | None]] = []
    for name in columns.images:
        try:
            found.append((encoded_image(row.values.get(name), row.folder or base), None))
        except BadImageError as error:
            found.append((None, error))
    return found


def key_of(image: EncodedImage, row: Row, columns: PairColumns) -> ScoreKey | None:
    """What scores know an image of a row by; None where it has no content or no prompt."""
    prompt = columns.caption_or_none(row)
    digest = None if prompt is None else digest_of(image)
    return None if digest is None or prompt is None else (digest, prompt)


class _Join:
    """Adds the numbers of the images of a row to its values."""

    def __init__(
        self, table: ScoreTable, columns: PairColumns, base: Path | None, names: Sequence[str]
    ) -> None:
        self.table, self.columns, self.base, self.names = table, columns, base, names
        self.added = [virtual(name)[side] for side in range(len(columns.images)) for name in names]

    def keys(self, row: Row) -> list[ScoreKey | None]:
        """Of the images of a row."""
        if row.problem is not None:
            return [None] * len(self.columns.images)
        images = sides_of(row, self.columns, self.base)
        return [key_of(image, row, self.columns) for image, _ in images]

    def numbers(self, keys: Sequence[ScoreKey | None]) -> list[float | None]:
        """As `added` names them."""
        return [
            None if key is None else self.table.number(name, key)
            for key in keys
            for name in self.names
        ]

    def with_numbers(self, row: Row, numbers: Sequence[float | None]) -> Row:
        values = {**row.values, **dict(zip(self.added, numbers, strict=True))}
        return dataclasses.replace(row, values=values)


class ScoredRows(AbstractRows):
    """Rows that are read at random, with their scores. Every image is read once to be told."""

    def __init__(self, rows: AbstractRows, join: _Join, data: str) -> None:
        """Args:
        rows: of pairs.
        join: adds scores.
        data: what is read, for messages.

        Raises:
            DataError: images of pairs are in none of the files.
        """
        self._rows, self._join = rows, join
        self.noun, self.set_aside = rows.noun, rows.set_aside
        self._numbers = np.full((len(rows), len(join.added)), np.nan)
        lacking: dict[str, list[str]] = {name: [] for name in join.table.columns}
        images = 0
        for number in range(len(rows)):
            row = rows[number]
            keys = join.keys(row)
            self._numbers[number] = [np.nan if x is None else x for x in join.numbers(keys)]
            if not _is_pair(row, join.columns):
                continue
            for key in keys:
                images += key is not None
                for name in [] if key is None else join.table.lacking(key):
                    lacking[name].append(row.name)
        for name, rows_without in lacking.items():
            if rows_without:
                raise _uncovered(join.table.columns[name], name, rows_without, images, data)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._with(self._rows[index], index)

    def start_of(self, index: int) -> Row:
        return self._with(self._rows.start_of(index), index)

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        real = [name for name in columns if name not in self._join.added]
        for number, row in enumerate(self._rows.scan(real)):
            yield self._with(row, number)

    def _with(self, row: Row, number: int) -> Row:
        numbers = [None if np.isnan(x) else float(x) for x in self._numbers[number]]
        return self._join.with_numbers(row, numbers)


class ScoredStream(WrappedStream):
    """Rows in order, with their scores; an image that has none is met when its turn comes."""

    def __init__(self, stream: AbstractRowStream, join: _Join) -> None:
        super().__init__(stream)
        self._join = join

    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        for cursor, row in self._stream.rows(part, start):
            yield cursor, self._join.with_numbers(row, self._join.numbers(self._join.keys(row)))


def _is_pair(row: Row, columns: PairColumns) -> bool:
    """Whether a row is a pair by its labels."""
    try:
        return not isinstance(columns.chosen(row), LeftOut)
    except UnusableRowError:
        return False


def _uncovered(
    column: ScoreColumn, name: str, rows: Sequence[str], images: int, data: str
) -> DataError:
    named = ", ".join(list(dict.fromkeys(rows))[:_MISSING_NAMED])
    scorer = column.scorer.kind
    return DataError(
        f"data.scores.columns.{name}: {column.path} has no score of {len(rows):,} of {images:,} "
        f"images of the pairs of {data} (by content and prompt), such as those of {named}: it is "
        f"of other images. Score these with\n  diffalign score data.path={data} "
        f"scorer.kind={scorer} output={column.path.parent}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A data set with its scores."""

    rows: AbstractRows | AbstractRowStream
    columns: PairColumns
    fingerprint: str
    """Of the files."""
    summary: str
    """What the scores are and decide, as the end of a sentence."""


def with_scores(
    rows: AbstractRows | AbstractRowStream,
    columns: PairColumns,
    base: Path | None,
    config: PairConfig,
    *,
    grouped: bool,
) -> Scored | None:
    """Join the scores of a config; None where it has none.

    Args:
        rows: of pairs.
        columns: their mapping.
        base: folder that relative image paths start from.
        config: of the data.
        grouped: whether they are made of rows of several images.

    Raises:
        DataError: a file is no file of scores, of another scorer or other images; or what is asked
            for cannot be had of this data.
    """
    section = config.scores
    if not section.columns:
        return None
    read = [name.removeprefix(SCORES) for name in config.strength.reads if name.startswith(SCORES)]
    _check_data(section, rows, columns, config, read, grouped=grouped)
    table = ScoreTable(section)
    names = names_read(section, read)
    for name in names:
        scorer = name.removesuffix(DEVIATION)
        if name.endswith(DEVIATION) and scorer in table.columns:
            _check_deviations(table.columns[scorer], name)
    told = [] if section.tag is None else table.all_of(section.tag.by)
    if section.tag is not None and (not told or told[0] == told[-1]):
        raise DataError(
            f"data.scores.tag tells the score {section.tag.by}, and all of them are equal: there "
            f"is nothing to tell"
        )
    numbers = {f"{SCORES}{name}": virtual(name) for name in read}
    joined = dataclasses.replace(
        columns,
        numbers={**columns.numbers, **numbers},
        scored=ScoreRules(config=section, told=told),
    )
    join = _Join(table, columns, base, names)
    if isinstance(rows, AbstractRowStream):
        with_them: AbstractRows | AbstractRowStream = ScoredStream(rows, join)
    else:
        with_them = ScoredRows(rows, join, config.path)
    return Scored(
        rows=with_them,
        columns=joined,
        fingerprint=table.digest(),
        summary=_describe(section, table),
    )


def _check_data(
    section: ScoresConfig,
    rows: AbstractRows | AbstractRowStream,
    columns: PairColumns,
    config: PairConfig,
    read: Sequence[str],
    *,
    grouped: bool,
) -> None:
    if section.order is not None and isinstance(rows, AbstractRowStream):
        raise DataError(
            f"data.scores.order has bands, and {config.path} is streamed: a stream does not know "
            f"its pairs in advance. Take a copy that is read at random (parquet, JSON lines, a "
            f"folder; data.streaming: false), or leave order out"
        )
    for key in ("filter", "order"):
        if len(columns.images) == 1 and getattr(section, key) is not None:
            raise DataError(
                f"data.scores.{key} is about the gap of two images, and {config.path} has one a "
                f"row: leave it out"
            )
    if len(columns.images) == 1 and section.tag is not None and section.tag.tells == "goal":
        raise DataError(
            f"data.scores.tag tells goals, which one of two images reaches, and {config.path} has "
            f"one a row: set tells to own"
        )
    regressed = [name for name in read if f"{SCORES}{name}" in config.strength.target]
    if grouped and config.strength.calibrated and regressed:
        raise DataError(
            f"data.strength.calibrated takes the win rates of a row's images against each other, "
            f"which are known of numbers in the row and not of data.scores ({regressed[0]}): set "
            f"calibrated to false, or put the scores next to the images"
        )


def _check_deviations(column: ScoreColumn, name: str) -> None:
    if not column.has_deviations:
        raise DataError(
            f"{name} is read, and {column.path} has no standard deviations: score the data again "
            f"with repeats=5 or so, into another file"
        )


def _describe(section: ScoresConfig, table: ScoreTable) -> str:
    said = [
        f"scores {name} by {column.scorer.kind} ({len(column.rows):,} images)"
        for name, column in table.columns.items()
    ]
    for key in ("filter", "order", "tag"):
        part: Any = getattr(section, key)
        if part is not None:
            said.append(f"{key} {_settings(configs.to_dict(part))}")
    return "; ".join(said)


def _settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
