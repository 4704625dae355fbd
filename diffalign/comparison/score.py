"""Score a folder of images, once each: a column file per scorer, resumable.

A score belongs to an image's content, its prompt and the scorer's fingerprint, not to a file name,
so renamed, repeated and regenerated images keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from diffalign.batching import each_or_error
from diffalign.data.decoding import IMAGE_SUFFIXES, BadImageError, decode
from diffalign.errors import CacheError, DataError
from diffalign.files import append_json_lines, read_rows
from diffalign.generation.manifest import (
    MANIFEST,
    ItemKey,
    file_digest,
    read_manifest,
)
from diffalign.imaging.image_files import pixels_of
from diffalign.parsing import decode_text
from diffalign.scorers.base import AbstractScorer

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


def score_images(
    images: Sequence[CaptionedImage],
    scorer: AbstractScorer,
    column: Path,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """Add the scores that a column lacks.

    Args:
        images: those already in the column are read, but not scored again.
        scorer: on its device.
        column: file that gets one row per distinct image and prompt.
        batch_size: images scored at once.
        on_batch: told how many images are done.

    Returns:
        The images that cannot be read or scored; a score that is not finite is no score.
    """
    known = read_column(column, scorer.fingerprint)
    column.parent.mkdir(parents=True, exist_ok=True)
    problems: list[Problem] = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        opened: dict[ScoreKey, _Opened] = {}
        for captioned in chunk:
            found = _open(captioned)
            if isinstance(found, Problem):
                problems.append(found)
            elif found.key not in known:
                opened[found.key] = found
        rows: list[ScoreRow] = []
        for item, outcome in _score(scorer, list(opened.values())):
            if isinstance(outcome, Exception):
                reason = f"{type(outcome).__name__}: {outcome}"
                problems.append(Problem(item.captioned.path, reason))
            elif not math.isfinite(outcome):
                problems.append(Problem(item.captioned.path, f"its score is {outcome}"))
            else:
                image, prompt = item.key
                rows.append(
                    ScoreRow(
                        image=image, prompt=prompt, fingerprint=scorer.fingerprint, score=outcome
                    )
                )
        append_json_lines(column, (asdict(row) for row in rows))
        known |= {(row.image, row.prompt): row.score for row in rows}
        on_batch(len(chunk))
    return problems


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


def _score(
    scorer: AbstractScorer, items: Iterable[_Opened]
) -> Iterator[tuple[_Opened, float | Exception]]:
    """Scores of images; those of one size are scored together."""

    def score(batch: Sequence[_Opened]) -> list[float]:
        images = torch.stack([item.pixels for item in batch])
        with torch.inference_mode():
            scores = scorer.score(images, [item.captioned.prompt for item in batch])
        if scores.shape != (len(batch),):
            raise ValueError(
                f"a scorer must return {len(batch)} numbers, got shape {tuple(scores.shape)}"
            )
        return scores.tolist()

    def size(item: _Opened) -> tuple[int, ...]:
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
