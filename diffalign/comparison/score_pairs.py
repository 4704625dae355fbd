"""Score the images of a preference data set: a file of scores that its rows can be joined to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row
from diffalign.data.decoding import BadImageError, EncodedImage, decode
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs, open_data
from diffalign.data.pairs.scored import key_of, sides_of
from diffalign.data.rows import AbstractRows
from diffalign.data.score_columns import (
    ScoreKey,
    ScorerIdentity,
    ScoreRow,
    read_score_column,
    write_score_column,
)
from diffalign.errors import CacheError, DataError
from diffalign.imaging.image_files import pixels_of
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.repeats import (
    Copy,
    Perturbation,
    copies_of,
    identity_of,
    outcomes,
)


@dataclass(frozen=True)
class _Found:
    """An image of the data set."""

    key: ScoreKey
    image: EncodedImage
    where: str


class PairScoresPlan(AbstractPlan):
    """The scores of a data set's images, as blocks of rows."""

    failures_in_a_row = None

    def __init__(
        self,
        data: PairConfig,
        scorer: AbstractScorer,
        column: Path,
        *,
        batch_size: int,
        repeats: int = 1,
        perturbation: Perturbation | None = None,
        device: str = "auto",
        place: Callable[[str | None], AbstractScorer] | None = None,
    ) -> None:
        """Open the data, and look at what has a score.

        Args:
            data: the pairs; ties and rows without a label are scored too.
            scorer: by whom.
            column: file that gets one row per distinct image and prompt.
            batch_size: copies of images scored at once.
            repeats: copies of each image, itself included.
            perturbation: how they differ.
            device: of the settings.
            place: puts the scorer on a worker's device; None takes it as it is.

        Raises:
            CacheError: another scorer made the column.
            DataError: there is no such data, or it is a stream.
        """
        self.folder, self.of, self.title = column.parent, column.stem, column.stem
        self.device, self._column, self._batch_size = device, column, batch_size
        self._perturbation = perturbation or Perturbation()
        self.identity = identity_of(scorer, repeats=repeats, perturbation=self._perturbation)
        self._place = place or (lambda device: scorer)
        self._data = open_data(data)
        if not isinstance(self._data.rows, AbstractRows):
            raise DataError(
                f"{self._data.summary}: blocks of a stream cannot be read by themselves. Score a "
                f"copy that is read at random (parquet, JSON lines, a folder)"
            )
        self.known = _read(column, self.identity)
        rows, each = len(self._data.rows), max(1, batch_size // repeats)
        self.blocks = [
            Block.of(
                place,
                [self.identity.whole_fingerprint, self._data.fingerprint, start],
                2 * (min(start + each, rows) - start),
                range(start, min(start + each, rows)),
            )
            for place, start in enumerate(range(0, rows, each))
        ]

    @property
    def data(self) -> OpenedPairs:
        """What is scored."""
        return self._data

    def is_done(self, block: Block) -> bool:
        return bool(self.known) and all(
            not isinstance(found, Failed) and found.key in self.known
            for found in self._images(block.work)
        )

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        scorer = self._place(device)
        return lambda block: self._score(scorer, block.work)

    def _images(self, rows: Sequence[int]) -> list[_Found | Failed]:
        """The distinct images of some rows; those that have no content failed."""
        data, found = self._data, dict[Any, _Found | Failed]()
        assert isinstance(data.rows, AbstractRows)
        for number in rows:
            row = data.rows[number]
            if row.problem is not None or data.columns.caption_or_none(row) is None:
                continue  # training skips it, and says why
            images = zip(data.columns.images, sides_of(row, data.columns, data.base), strict=True)
            for name, (image, problem) in images:
                key = key_of(image, row, data.columns)
                where = f"{row.name}, {name}"
                if key is None:
                    reason = problem.detail if problem else f"there is no file {image!s}"
                    found[where] = _failed(where, reason)
                else:
                    found.setdefault(key, _Found(key, image, where))
        return list(found.values())

    def _score(self, scorer: AbstractScorer, rows: Sequence[int]) -> list[Row | Failed]:
        made: list[Row | Failed] = []
        copies: list[Copy] = []
        for found in self._images(rows):
            if isinstance(found, Failed):
                made.append(found)
            elif found.key not in self.known:
                try:
                    pixels = pixels_of(decode(found.image))
                except BadImageError as error:
                    problem = f"{error.reason.value}: {error.detail}"
                    made.append(_row(found.key, None, problem=problem))
                    continue
                repeats = self.identity.repeats
                copies += copies_of(found.key, pixels, repeats, self._perturbation)
        return made + self._rows(scorer, copies)

    def _rows(self, scorer: AbstractScorer, copies: Sequence[Copy]) -> list[Row | Failed]:
        made: list[Row | Failed] = []
        for key, found in outcomes(scorer, copies, self._batch_size).items():
            if found.score is None:
                made.append(_failed(f"{key[1]!r:.60}, SHA-256 {key[0][:12]}", found.problem))
            else:
                made.append(_row(key, found.score, found.deviation))
        return made

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        known = _read(self._column, self.identity)
        for row in (ScoreRow(**values) for values in rows):
            known.setdefault(row.key, row)
        write_score_column(self._column, self.identity, [*known.values()])


def _row(
    key: ScoreKey,
    score: float | None,
    deviation: float | None = None,
    *,
    problem: str | None = None,
) -> Row:
    row = ScoreRow(image=key[0], prompt=key[1], score=score, deviation=deviation, problem=problem)
    return Row(asdict(row))


def _failed(where: str, reason: str) -> Failed:
    return Failed({"path": where, "reason": reason})


def _read(column: Path, identity: ScorerIdentity) -> dict[ScoreKey, ScoreRow]:
    """What a file has; an absent one is empty.

    Raises:
        CacheError: another scorer made it.
    """
    if not column.is_file():
        return {}
    found = read_score_column(column)
    if found.scorer.whole_fingerprint != identity.whole_fingerprint:
        raise CacheError(
            f"{column} holds scores by {found.scorer.whole_fingerprint}, and this is "
            f"{identity.whole_fingerprint}. Choose another file with name=NAME, or delete it"
        )
    return dict(found.rows)
