"""The images that pairs are made of, by prompt, with their scores: of a folder or a data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.comparison.score import SCORES, find_images
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.scored import ScoreTable, key_of, sides_of
from diffalign.data.pairs.scores import ENSEMBLE, ScoreFile, ScoresConfig
from diffalign.data.rows import AbstractRows
from diffalign.data.score_columns import (
    ScoreColumn,
    ScoreKey,
    digest_of,
    read_score_column,
)
from diffalign.data.skipping import LeftOut, UnusableRowError
from diffalign.errors import DataError, did_you_mean
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.pair_rules.base import LabelledPair, Pair, ScoredGroup

Read = Callable[[], bytes]
"""The content of an image file; raises OSError where it is gone."""


@dataclass(frozen=True)
class Candidate:
    """An image that may become a side of a pair."""

    key: ScoreKey
    """SHA-256 and prompt."""
    read: Read


@dataclass(frozen=True)
class _Label:
    """What people said of two images."""

    keys: tuple[ScoreKey, ScoreKey]
    first_wins: float


@dataclass
class ImagesByPrompt:
    """All images of a source, and what is left out of it."""

    summary: str
    """What is read, as a noun phrase."""
    candidates: dict[ScoreKey, Candidate] = field(default_factory=dict)
    labels: list[_Label] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Image or row, and the reason why it is in no group."""

    def add(self, key: ScoreKey, read: Read) -> None:
        """Add an image; equal ones of a prompt are one."""
        self.candidates.setdefault(key, Candidate(key, read))

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append({"name": name, "reason": reason})


def of_folder(folder: Path, models: Sequence[str] = ()) -> ImagesByPrompt:
    """The images of a folder that `generate` filled, or of one of images with captions.

    Args:
        folder: of the images.
        models: whose images, by their names in the manifest; empty takes all.

    Raises:
        DataError: there are none, or no such model.
    """
    found = ImagesByPrompt(f"images of {folder}")
    if (folder / MANIFEST).is_file():
        rows = read_manifest(folder)
        known = sorted({row.model for row in rows})
        for name in models:
            if name not in known:
                raise DataError(
                    f"models names {name}, and {folder} has images of {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
        images = [(folder / r.file, r.prompt) for r in rows if not models or r.model in models]
    elif models:
        raise DataError(
            f"models chooses among those of a {MANIFEST}, and {folder} has none: leave it out"
        )
    else:
        listed, problems = find_images(folder)
        images = [(image.path, image.prompt) for image in listed]
        for problem in problems:
            found.leave_out(str(problem.path), problem.reason)
    for path, prompt in images:
        digest = digest_of(path)
        if digest is None:
            found.leave_out(str(path), "there is no such file, or it cannot be read")
        else:
            found.add((digest, prompt), path.read_bytes)
    return found


def of_data(config: PairConfig) -> ImagesByPrompt:
    """The images of a data set of pairs or groups, and its labels; every image is read once.

    Raises:
        DataError: there is no such data, or it is a stream.
    """
    data = open_data(config)
    rows, columns = data.rows, data.columns
    if not isinstance(rows, AbstractRows):
        raise DataError(
            f"{data.summary}: the images of a prompt are gathered from all rows, and a stream has "
            f"none at random. Take a copy that is read so (parquet, JSON lines, a folder)"
        )
    found = ImagesByPrompt(data.summary)
    for number in range(len(rows)):
        row = rows[number]
        if row.problem is not None or columns.caption_or_none(row) is None:
            found.leave_out(row.name, row.problem or "it has no caption")
            continue
        keys: list[ScoreKey | None] = []
        for side, (image, problem) in enumerate(sides_of(row, columns, data.base)):
            key = key_of(image, row, columns)
            keys.append(key)
            if key is None:
                reason = problem.detail if problem else f"there is no file {image!s}"
                found.leave_out(f"{row.name}, {columns.images[side]}", reason)
            else:
                found.add(key, _reader(rows, number, side, columns, data.base))
        try:
            chosen = columns.chosen(row)
        except UnusableRowError as error:
            found.leave_out(row.name, error.detail)
            continue
        shares = {0: 1.0, 1: 0.0, LeftOut.TIE: 0.5}
        if chosen in shares and len(keys) == 2 and None not in keys:
            found.labels.append(_Label((keys[0], keys[1]), shares[chosen]))  # type: ignore[arg-type]
    return found


def _reader(
    rows: AbstractRows, number: int, side: int, columns: Any, base: Path | None
) -> Callable[[], bytes]:
    """Reads an image of a row when it is asked for, so that no image is held in memory."""

    def read() -> bytes:
        image, _ = sides_of(rows[number], columns, base)[side]
        return image.read_bytes() if isinstance(image, Path) else image or b""

    return read


def columns_of_folder(folder: Path) -> dict[str, Path]:
    """The files of scores next to generated images: a name for each, and the file."""
    files = sorted((folder / SCORES).glob("*.jsonl"))
    return {as_name(file.stem): file for file in files if not file.name.startswith(".")}


def as_name(text: str) -> str:
    """A name of letters, digits and underscores."""
    found = re.sub(r"\W", "_", text)
    return found if found.isidentifier() else f"_{found}"


def read_columns(files: Mapping[str, Path]) -> dict[str, ScoreColumn]:
    """Files of scores, those of a data set and those next to generated images alike.

    Raises:
        DataError: one is not there, or no file of scores.
    """
    return {name: read_score_column(file) for name, file in files.items()}


class ScoredSource:
    """Groups of scored images, one a prompt."""

    def __init__(
        self, images: ImagesByPrompt, columns: Mapping[str, ScoreColumn], by: str | None
    ) -> None:
        """Join scores to images.

        Args:
            images: of the source; those without every score are added to what is left out.
            columns: the scores by name.
            by: which of them prefers one image to another; None is the only one, or of several
                their ensemble, each in units of its own spread.

        Raises:
            DataError: there is no such score, or no image has one.
        """
        self.images, self.columns = images, dict(columns)
        several = tuple(columns) if len(columns) > 1 else ()
        config = ScoresConfig(
            columns={
                name: ScoreFile(file=column.path, scorer=column.scorer.kind)
                for name, column in columns.items()
            },
            ensemble=several,
        )
        self.by = by or (ENSEMBLE if several else next(iter(columns)))
        known = [*columns, *([ENSEMBLE] if several else [])]
        if self.by not in known:
            raise DataError(
                f"by is {self.by}, and there are scores {', '.join(known)}."
                f"{did_you_mean(self.by, known)}"
            )
        table = ScoreTable(config, columns)
        self._members: dict[str, list[Candidate]] = {}
        self._scores: dict[ScoreKey, dict[str, float]] = {}
        for key, candidate in images.candidates.items():
            numbers = {name: table.number(name, key) for name in known}
            lacks = [name for name in columns if numbers[name] is None]
            if lacks:
                images.leave_out(f"{key[0][:12]}, {key[1]!r:.60}", _why(lacks[0], columns, key))
                continue
            self._scores[key] = {n: x for n, x in numbers.items() if x is not None}
            self._members.setdefault(key[1], []).append(candidate)
        if not self._scores:
            raise DataError(
                f"{images.summary}: no image has a score in {', '.join(map(_file, self._files))} "
                f"(by content and prompt): these are of other images. Score these with "
                f"`diffalign score`"
            )

    @property
    def _files(self) -> list[ScoreColumn]:
        return list(self.columns.values())

    @property
    def prompts(self) -> list[str]:
        """Of all groups, in order."""
        return list(self._members)

    def members(self, prompt: str) -> list[Candidate]:
        """The images of a prompt, in the order of its group."""
        return self._members[prompt]

    def numbers(self, key: ScoreKey) -> Mapping[str, float]:
        """All scores of an image by name."""
        return self._scores[key]

    def group(self, prompt: str) -> ScoredGroup:
        """The scores of a prompt's images."""
        scores = [self._scores[candidate.key] for candidate in self._members[prompt]]
        return ScoredGroup(
            prompt=prompt,
            scores=tuple(each[self.by] for each in scores),
            by_scorer={name: tuple(each[name] for each in scores) for name in self.columns},
        )

    def keys_of(self, pair: LabelledPair) -> tuple[ScoreKey, ScoreKey]:
        """The two images of a labelled pair."""
        members = self._members[pair.group.prompt]
        first, second = pair.places
        return members[first].key, members[second].key

    def labelled(self) -> Iterator[LabelledPair]:
        """The pairs about which the data set says who won, where both images have scores."""
        places: dict[str, tuple[ScoredGroup, dict[ScoreKey, int]]] = {}
        for prompt in self._members:
            members = {candidate.key: n for n, candidate in enumerate(self._members[prompt])}
            places[prompt] = (self.group(prompt), members)
        for label in self.images.labels:
            group, members = places.get(label.keys[0][1], (None, {}))
            if group is not None and all(key in members for key in label.keys):
                pair: Pair = (members[label.keys[0]], members[label.keys[1]])
                yield LabelledPair(group=group, places=pair, label=label.first_wins)


def _file(column: ScoreColumn) -> str:
    return str(column.path)


def _why(name: str, columns: Mapping[str, ScoreColumn], key: ScoreKey) -> str:
    row = columns[name].rows.get(key)
    problem = None if row is None else row.problem
    return f"it has no score {name}{f': {problem}' if problem else f' in {columns[name].path}'}"
