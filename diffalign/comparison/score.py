"""Score a folder of images, once each: a column file per scorer, resumable.

A score belongs to an image's content, its prompt and the scorer's fingerprint, not to a file name,
so renamed, repeated and regenerated images keep theirs.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.batching import each_or_error
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row, here
from diffalign.data.decoding import IMAGE_SUFFIXES, BadImageError, decode
from diffalign.errors import CacheError, DataError
from diffalign.files import add_json_lines, read_rows
from diffalign.generation.manifest import (
    MANIFEST,
    ItemKey,
    file_digest,
    read_manifest,
)
from diffalign.imaging.image_files import pixels_of
from diffalign.parsing import decode_text
from diffalign.scorers.base import AbstractScorer
from diffalign.sessions import complete

SCORES = "scores"
"""Folder of the column files, next to the manifest."""


@dataclass(frozen=True)
class CaptionedImage:
    """A file and what it was asked to show."""

    path: Path
    prompt: str
    sha256: str | None = None
    """Digest of the content in the manifest; None where there is no manifest."""


@dataclass(frozen=True)
class Problem:
    """An image without a score."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score."""

    image: str
    """SHA-256 of the file."""
    prompt: str
    fingerprint: str
    """Of the scorer."""
    score: float


ScoreKey = tuple[str, str]
"""SHA-256 of the image, prompt."""


def find_images(folder: Path) -> tuple[list[CaptionedImage], list[Problem]]:
    """The images of a manifest, or else all of a folder that have a caption file next to them.

    Args:
        folder: searched with all its subfolders; `x.png` has its caption in `x.txt`.

    Returns:
        The images, and those whose caption is missing or no text.

    Raises:
        DataError: there is no image at all.
    """
    if (folder / MANIFEST).is_file():
        rows = read_manifest(folder)
        return [CaptionedImage(folder / row.file, row.prompt, row.sha256) for row in rows], []
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{folder}: holds neither {MANIFEST} nor an image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    images: list[CaptionedImage] = []
    problems: list[Problem] = []
    for path in files:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            problems.append(Problem(path, f"has no caption: there is no {caption.name}"))
            continue
        try:
            prompt = decode_text(caption.read_bytes(), caption).strip()
        except (DataError, OSError) as error:
            problems.append(Problem(path, f"has no caption that can be read: {error}"))
        else:
            images.append(CaptionedImage(path, prompt))
    return images, problems


def read_column(path: Path, fingerprint: str | None = None) -> dict[ScoreKey, float]:
    """The scores of a column file; an absent file is an empty column.

    Args:
        path: `scores/<name>.jsonl`.
        fingerprint: of the scorer that goes on with the column; None takes whatever made it.

    Raises:
        CacheError: another scorer, or the same one with other settings, made the column.
    """
    if not path.is_file():
        return {}
    rows = read_rows(ScoreRow, path)
    for row in rows:
        expected = fingerprint or rows[0].fingerprint
        if row.fingerprint != expected:
            raise CacheError(
                f"{path} holds scores of a scorer with fingerprint {row.fingerprint}, and this "
                f"one has {expected}. Choose another column with name=NAME, or delete the file"
            )
    return {(row.image, row.prompt): row.score for row in rows}


class ScoresPlan(AbstractPlan):
    """The scores of a folder's images, as blocks: images that are opened together."""

    failures_in_a_row = None

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        scorer: AbstractScorer,
        column: Path,
        *,
        batch_size: int,
        device: str = "auto",
        place: Callable[[str | None], AbstractScorer] | None = None,
    ) -> None:
        """Look at what has a score; of images without a manifest that reads them all.

        Args:
            images: what is scored.
            scorer: by whom.
            column: file that gets one row per distinct image and prompt.
            batch_size: images scored at once.
            device: of the settings.
            place: puts the scorer on a worker's device; None takes it as it is.

        Raises:
            CacheError: another scorer made the column.
        """
        self.folder, self.of, self.title = column.parent, column.stem, column.stem
        self.device, self._column, self._scorer = device, column, scorer
        self._place = place or (lambda device: scorer)
        self.known = read_column(column, scorer.fingerprint)
        chunks = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        self.blocks = [
            Block.of(
                place,
                [scorer.fingerprint, [_identity(image, column) for image in chunk]],
                len(chunk),
                chunk,
            )
            for place, chunk in enumerate(chunks)
        ]

    def is_done(self, block: Block) -> bool:
        return bool(self.known) and all(self._has_score(image) for image in block.work)

    def _has_score(self, image: CaptionedImage) -> bool:
        try:
            digest = file_digest(image.path.read_bytes())
        except OSError:
            return False
        return image.sha256 in (None, digest) and (digest, image.prompt) in self.known

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        scorer = self._place(device)
        return lambda block: self._score(scorer, block.work)

    def _score(
        self, scorer: AbstractScorer, images: Sequence[CaptionedImage]
    ) -> list[Row | Failed]:
        made: list[Row | Failed] = []
        opened: dict[ScoreKey, _Opened] = {}
        for captioned in images:
            found = _open(captioned)
            if isinstance(found, Problem):
                made.append(_failed(found.path, found.reason))
            elif found.key not in self.known:
                opened[found.key] = found
        for item, outcome in scored(scorer, list(opened.values())):
            if isinstance(outcome, Exception):
                made.append(_failed(item.captioned.path, f"{type(outcome).__name__}: {outcome}"))
            elif not math.isfinite(outcome):
                made.append(_failed(item.captioned.path, f"its score is {outcome}"))
            else:
                image, prompt = item.key
                row = ScoreRow(
                    image=image, prompt=prompt, fingerprint=scorer.fingerprint, score=outcome
                )
                made.append(Row(asdict(row)))
        return made

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        there = read_column(self._column).keys()
        new = {(row["image"], row["prompt"]): row for row in reversed(rows)}
        add_json_lines(self._column, [new[key] for key in reversed(new.keys()) if key not in there])


def _failed(path: Path, reason: str) -> Failed:
    return Failed({"path": str(path), "reason": reason})


def _identity(image: CaptionedImage, column: Path) -> list[Any]:
    """Tells an image from what may lie under its name later."""
    name = Path(os.path.relpath(image.path, column.parent)).as_posix()
    if image.sha256 is not None:
        return [name, image.prompt, image.sha256]
    try:
        return [name, image.prompt, file_digest(image.path.read_bytes())]
    except OSError:
        return [name, image.prompt]


def score_images(
    images: Sequence[CaptionedImage], scorer: AbstractScorer, column: Path, *, batch_size: int
) -> list[Problem]:
    """Add the scores that a column lacks, in this process.

    Args:
        images: those already in the column are read, but not scored again.
        scorer: on its device.
        column: file that gets one row per distinct image and prompt.
        batch_size: images scored at once.

    Returns:
        The images that cannot be read or scored; a score that is not finite is no score.
    """
    make = functools.partial(ScoresPlan, images, scorer, column, batch_size=batch_size)
    return problems_of(complete(make, here()).failed)


def problems_of(failed: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """What a plan of scores could not score."""
    return [Problem(Path(each["path"]), each["reason"]) for each in failed]


@dataclass(frozen=True)
class _Opened:
    captioned: CaptionedImage
    key: ScoreKey
    pixels: Tensor
    """Shape [3, H, W], float32 in [-1, 1]."""

    @property
    def prompt(self) -> str:
        """What it was asked to show."""
        return self.captioned.prompt


def _open(captioned: CaptionedImage) -> _Opened | Problem:
    try:
        content = captioned.path.read_bytes()
        pixels = pixels_of(decode(content))
    except OSError as error:
        return Problem(captioned.path, f"cannot be read: {error}")
    except BadImageError as error:
        return Problem(captioned.path, f"cannot be read: {error.reason.value}: {error.detail}")
    digest = file_digest(content)
    if captioned.sha256 not in (None, digest):
        return Problem(
            captioned.path, "is not the image that the manifest lists: generate it again"
        )
    return _Opened(captioned, (digest, captioned.prompt), pixels)


class Prompted(Protocol):
    """An image that was opened."""

    @property
    def pixels(self) -> Tensor:
        """Shape [3, H, W], float32 in [-1, 1]."""

    @property
    def prompt(self) -> str:
        """What it was asked to show."""


Item = TypeVar("Item", bound=Prompted)


def scored(
    scorer: AbstractScorer, items: Iterable[Item]
) -> Iterator[tuple[Item, float | Exception]]:
    """Scores of images, or what a scorer raised; those of one size are scored together."""

    def score(batch: Sequence[Item]) -> list[float]:
        images = torch.stack([item.pixels for item in batch])
        with torch.inference_mode():
            scores = scorer.score(images, [item.prompt for item in batch])
        if scores.shape != (len(batch),):
            raise ValueError(
                f"a scorer must return {len(batch)} numbers, got shape {tuple(scores.shape)}"
            )
        return scores.tolist()

    def size(item: Item) -> tuple[int, ...]:
        return tuple(item.pixels.shape)

    for _, group in groupby(sorted(items, key=size), key=size):
        yield from each_or_error(score, list(group))


def scores_by_item(folder: Path, column: Path) -> dict[ItemKey, float]:
    """A column seen through the manifest; items without a score are absent."""
    scores = read_column(column)
    return {
        row.key: scores[row.sha256, row.prompt]
        for row in read_manifest(folder)
        if (row.sha256, row.prompt) in scores
    }
