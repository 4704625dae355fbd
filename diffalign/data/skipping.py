"""Rows that make no sample: why, and the list of them, skipped.jsonl."""

from __future__ import annotations

import contextlib
import enum
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from diffalign.errors import DataError
from diffalign.files import to_json
from diffalign.keys import hide
from diffalign.parsing import parse_json


class LeftOut(enum.Enum):
    """Why a sound row makes no pair: it holds no preference. Counted, not listed."""

    TIE = "tie"
    UNLABELLED = "no label"
    SMALL_GAP = "gap of scores too small"
    SCORERS_DISAGREE = "scorers disagree"
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
    DAMAGED = "damaged encoding"
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
    """The words of the decoder, or which file is missing."""
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


def forget_skipped(path: Path) -> None:
    """Empty the list of an earlier run; for one rank, before any opens it.

    Args:
        path: the file; it need not exist.
    """
    path.unlink(missing_ok=True)


class SkipLog:
    """Unusable samples by id, shared by all ranks through one file.

    Ranks meet different samples in different epochs. Whoever adds one first reads what the others
    have added, under a lock; so each sample has one line, and every rank counts all of them. A run
    that resumes finds its earlier lines again.
    """

    def __init__(self, path: Path | None, *, section: str = "data") -> None:
        """Args:
        path: the file; None keeps the list in memory.
        section: of the config, for messages.
        """
        self.path = path
        self._section = section
        self._found: dict[str, tuple[str, str]] = {}  # id -> reason and detail
        self._read_bytes = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._read_new()

    @property
    def counts(self) -> dict[str, int]:
        """Samples by reason, those included that other ranks have added since."""
        if self.path is not None:
            with self._lock():
                self._read_new()
        return dict(Counter(reason for reason, _ in self._found.values()))

    def __len__(self) -> int:
        return len(self._found)

    def first(self, n: int) -> list[str]:
        """For a message: the first samples, their reasons and what each was in its case."""
        first = list(self._found.items())[:n]
        return [f"{name} ({reason}: {detail})" for name, (reason, detail) in first]

    def add(self, skipped: Skipped) -> None:
        """Count and list a sample, unless it is listed already."""
        if skipped.sample_id in self._found:
            return
        if self.path is None:
            self._found[skipped.sample_id] = (skipped.reason.value, skipped.detail)
            return
        with self._lock():
            self._read_new()
            if skipped.sample_id not in self._found:
                self._append(skipped)
                self._read_new()

    def stop_above(self, share: float, *, out_of: int) -> None:
        """Raise DataError, naming the first, if more than `share` of `out_of` pairs are here."""
        if len(self) <= share * out_of:
            return
        listed = f"; all are listed in {self.path}" if self.path else ""
        first = "\n  ".join(self.first(10))
        raise DataError(
            f"{len(self):,} of {out_of:,} pairs cannot be used, more than "
            f"{self._section}.max_bad_fraction = {share:g} allows. The first{listed}:\n  {first}\n"
            f"Repair or remove them, or raise {self._section}.max_bad_fraction"
        )

    def _lock(self) -> FileLock:
        assert self.path is not None
        return FileLock(self.path.with_name(f".{self.path.stem}.lock"))

    def _append(self, skipped: Skipped) -> None:
        assert self.path is not None
        line = {
            "sample_id": skipped.sample_id,
            "reason": skipped.reason.value,
            "detail": hide(skipped.detail),
            "side": skipped.side,
        }
        with self.path.open("ab") as file:
            file.write(to_json(line).encode() + b"\n")

    def _read_new(self) -> None:
        """Take in the lines added since the last look; a line cut off by a crash is dropped."""
        assert self.path is not None
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            file.seek(self._read_bytes)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(self._read_bytes + whole)
        for line in content[:whole].splitlines():
            # A damaged line is passed over: its sample is listed again when it is met again.
            with contextlib.suppress(DataError, TypeError, KeyError):
                known = parse_json(line, "a line")
                self._found.setdefault(known["sample_id"], (known["reason"], known["detail"]))
        self._read_bytes += whole
