"""What a reader yields: one preference, before anything of it is decoded."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

EncodedImage = bytes | Path | None
"""A file's content, or where it lies; None where the data set has no image. Decoding waits for the
loader's workers, where a bad image can be skipped and listed."""


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Two images for one prompt, one of them preferred; or the preferred one alone."""

    sample_id: str
    """Unique within the data set and stable between runs: randomness derives from it."""
    prompt: str
    """The caption without blanks around it; may be empty here, the loader skips and lists it."""
    chosen: EncodedImage
    """The preferred side."""
    rejected: EncodedImage
    """The other side; None where the data set has preferred images alone."""
    preference: float = 1.0
    """Probability that the chosen side is the preferred one; one half for a tie that is kept."""
    importance: float = 1.0
    """How much the pair counts, relative to others."""


class LeftOut(enum.Enum):
    """Why a sound row makes no pair: it holds no preference. Counted, not listed."""

    TIE = "tie"
    UNLABELLED = "no label"
    OTHER_LABEL = "a label that the objective does not read"


class SkipReason(enum.Enum):
    """Why a row that should make a pair cannot be used. Counted, and listed in skipped.jsonl."""

    EMPTY_CAPTION = "empty caption"
    MISSING_IMAGE = "missing image"
    EMPTY_FILE = "zero-size image"
    CORRUPT = "corrupt image"
    TRUNCATED = "truncated image"
    TOO_LARGE = "image above max_pixels"
    UNSUITABLE = "image that the model's processor refuses"
    REMOTE = "image behind an address"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    IDENTICAL = "identical chosen and rejected"
    MARKERS = "wrong number of image markers"
    MALFORMED = "malformed row"
    MISSING_RESPONSE = "missing response"
    UNJUDGED = "no judged parts"
    NOTHING_COUNTS = "no token counts"
    TOO_LONG = "row above max_length"
    END_INSIDE = "end token inside a response"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One row that cannot be used: a line of skipped.jsonl."""

    sample_id: str
    reason: SkipReason
    detail: str
    """What the decoder said, or which file is missing."""
    side: str | None = None
    """Which image or response it is about, such as `chosen`; None where it is about none."""


class UnusableRowError(Exception):
    """A row that should make a pair and cannot, and why."""

    def __init__(self, reason: SkipReason, detail: str, side: str | None = None) -> None:
        super().__init__(reason, detail, side)  # all, so that it survives pickling
        self.reason = reason
        self.detail = detail
        self.side = side

    def skipped(self, sample_id: str) -> Skipped:
        """The line of skipped.jsonl."""
        return Skipped(sample_id=sample_id, reason=self.reason, detail=self.detail, side=self.side)
