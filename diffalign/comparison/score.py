"""Score a folder of images, once each: a column file per scorer, resumable.

A score belongs to an image's content, its prompt and the scorer's fingerprint, not to a file name,
so renamed, repeated and regenerated images keep theirs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

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
from diffalign.scorers.repeats import Perturbation, copies_of, identity_of, outcomes
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
    """Mean over the copies."""
    deviation: float | None = None
    """Standard deviation over the copies, of n - 1; absent where there is one."""


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
        repeats: int = 1,
        perturbation: Perturbation | None = None,
        device: str = "auto",
        place: Callable[[str | None], AbstractScorer] | None = None,
    ) -> None:
        """Look at what has a score; of images without a manifest that reads them all.

        Args:
            images: what is scored.
            scorer: by whom.
            column: file that gets one row per distinct image and prompt.
            batch_size: copies of images scored at once.
            repeats: copies of each image, itself included.
            perturbation: how they differ.
            device: of the settings.
            place: puts the scorer on a worker's device; None takes it as it is.

        Raises:
            CacheError: another scorer made the column.
        """
        self.folder, self.of, self.title = column.parent, column.stem, column.stem
        self.device, self._column, self._batch_size = device, column, batch_size
        self._repeats, self._perturbation = repeats, perturbation or Perturbation()
        self._place = place or (lambda device: scorer)
        self.images = images
        self._fingerprint = identity_of(
            scorer, repeats=repeats, perturbation=self._perturbation
        ).whole_fingerprint
        self.known = read_column(column, self._fingerprint)
        each = max(1, batch_size // repeats)
        chunks = [images[i : i + each] for i in range(0, len(images), each)]
        self.blocks = [
            Block.of(
                place,
                [self._fingerprint, [_identity(image, column) for image in chunk]],
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
        copies = [
            copy
            for key, found in opened.items()
            for copy in copies_of(key, found.pixels, self._repeats, self._perturbation)
        ]
        for key, outcome in outcomes(scorer, copies, self._batch_size).items():
            if outcome.score is None:
                made.append(_failed(opened[key].captioned.path, outcome.problem))
                continue
            row = ScoreRow(
                image=key[0],
                prompt=key[1],
                fingerprint=self._fingerprint,
                score=outcome.score,
                deviation=outcome.deviation,
            )
            made.append(Row({k: v for k, v in asdict(row).items() if v is not None}))
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


def scores_by_item(folder: Path, column: Path) -> dict[ItemKey, float]:
    """A column seen through the manifest; items without a score are absent."""
    scores = read_column(column)
    return {
        row.key: scores[row.sha256, row.prompt]
        for row in read_manifest(folder)
        if (row.sha256, row.prompt) in scores
    }
