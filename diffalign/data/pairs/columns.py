"""Meaning of the columns of a row: which is the prompt, which the images, and which image won."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.decoding import BadImageError, EncodedImage, encoded_image
from diffalign.data.pairs.scores import ScoreRules
from diffalign.data.rows import Row
from diffalign.data.skipping import LeftOut, SkipReason, UnusableRowError
from diffalign.data.strength.base import (
    LABELS,
    NOTHING_ASKED,
    SCORES,
    Numbers,
    Strength,
    number_pair,
)
from diffalign.data.strength.settings import StrengthConfig
from diffalign.errors import DataError
from diffalign.parsing import decode_text, shortly


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
    strength: Strength = NOTHING_ASKED
    """How sure the preference is, and how much the pair counts."""
    own_prompts: Mapping[str, str] = field(default_factory=dict)
    """Side -> its prompt, where each is seen under one of its own; empty where both share it."""
    user: str | None = None
    """Who gave the verdict, where a column is asked for it."""


PAIR_VIEWS = ("chosen", "rejected")
"""The views that a pair offers, in the order of every batch."""


@dataclass(frozen=True, kw_only=True)
class PairColumns:
    """A mapping from the columns of a data set to a preference.

    Without `scores` and `preferred`, the first image is the preferred one in every row; it may be
    the only one.
    """

    prompt: str
    images: tuple[str, ...]
    """Two of them, or one."""
    scores: tuple[str, str] | None = None
    """A number for each image."""
    preferred: str | None = None
    """A column that names the preferred image's column, or says `tie`."""
    allowed_scores: tuple[float, ...] = ()
    """The only values that `scores` may take; empty for any number."""
    has_label: str | None = None
    """A column that is false where the other label columns mean nothing."""
    identity: tuple[str, ...] = ()
    """Columns that together identify a row; empty for its place in the data set."""
    lower_is_better: bool = False
    """Whether the smaller score wins."""
    keep_ties: bool = False
    """Whether a tie is a pair of which neither side is preferred, instead of being left out."""
    pairs_per_prompt: str | None = None
    """A column that says how many pairs there are of a row's prompt; each then counts as much less
    as there are more."""
    others: tuple[str, ...] = ()
    """Columns that say what the first and the second image is, where several rows are verdicts on
    the same two; see `annotators`."""
    strength: StrengthConfig = field(default_factory=StrengthConfig)
    """What becomes of the numbers of a row besides the order of its images."""
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> columns of the first and the second image, or one column of lists of two or of shares
    of the first, of the numbers that `strength` reads besides `scores`. A row in which one is null
    has no label."""
    scored: ScoreRules | None = None
    """What scores of the images decide, where they are joined to the rows."""
    along: tuple[str, ...] = ()
    """Columns that are read along, and mean nothing to a pair."""
    user: str | None = None
    """A column, one of `along`, that says who gave the verdict."""

    def __post_init__(self) -> None:
        if self.lower_is_better and self.scores is None:
            raise DataError(
                "data.labels: lower_is_better reverses the numbers of the two images, and this "
                f"data set has none: {self.describe_preference()}. Remove data.labels"
            )

    @property
    def sides(self) -> tuple[str, ...]:
        """The views that a row offers."""
        return PAIR_VIEWS[: len(self.images)]

    def light(self) -> list[str]:
        """The columns that decide about a row without its images."""
        return [
            self.prompt,
            *(self.scores or ()),
            *(n for n in (self.preferred, self.has_label, self.pairs_per_prompt) if n),
            *self.identity,
            *(column for columns in self.numbers.values() for column in columns),
            *(name for name in self.others if name not in self.images),
        ]

    def all(self) -> list[str]:
        """Every column that is read."""
        return [*self.light(), *self.images, *self.along]

    def describe_preference(self) -> str:
        """The rule as half a sentence."""
        if self.scores is not None:
            which = "smaller" if self.lower_is_better else "larger"
            return f"preferred is the image with the {which} of {' and '.join(self.scores)}"
        if self.preferred is not None:
            return f"preferred is the image that {self.preferred} names"
        if len(self.images) == 1:
            return "every image is a preferred one, with nothing to compare it with"
        return f"preferred is {self.images[0]} in every row"

    def describe(self) -> str:
        """The whole mapping as a sentence for the user."""
        ties = ", ties are kept" if self.keep_ties else ""
        weights = f", weighted by 1 / {self.pairs_per_prompt}" if self.pairs_per_prompt else ""
        strength = f"; {said}" if (said := self.strength.describe()) else ""
        return (
            f"prompt from {self.prompt}, images from {' and '.join(self.images)}, "
            f"{self.describe_preference()}{ties}{weights}{strength}"
        )

    def sample_id(self, row: Row) -> str:
        """The identifying columns, or the row's place."""
        if not self.identity or row.problem is not None:
            return row.name
        return "-".join(_text(row.values[name]) for name in self.identity)

    def caption(self, row: Row) -> str:
        """The prompt without blanks around it; empty where there is none.

        Raises:
            UnusableRowError: it is no text.
        """
        value = row.values[self.prompt]
        if value is None or value != value:  # NaN is pandas' null
            return ""
        if isinstance(value, bool) or not isinstance(value, (str, bytes, int)):
            raise _malformed(f"{self.prompt} is {shortly(value)}, expected a text")
        try:
            text = decode_text(value, self.prompt) if isinstance(value, bytes) else str(value)
        except (DataError, ValueError) as error:  # of an integer with more than 4300 digits
            raise _malformed(str(error)) from None
        if "\0" in text:
            raise _malformed(
                f"{self.prompt} is {shortly(text)}, with NUL characters as of UTF-16 without its "
                "mark: save it as UTF-8"
            )
        return text.removeprefix("\ufeff").strip()

    def caption_or_none(self, row: Row) -> str | None:
        """The prompt; None where there is none that can be used."""
        try:
            return None if row.problem else self.caption(row) or None
        except UnusableRowError:
            return None

    def chosen(self, row: Row) -> int | LeftOut:
        """Which of the two images is preferred, 0 or 1; of a tie that is kept, the first.

        Raises:
            UnusableRowError: a label is none that this mapping allows.
        """
        if row.problem is not None:
            raise _malformed(row.problem)
        verdict = self._verdict(row)
        labelled = 0 if verdict is LeftOut.TIE and self.keep_ties else verdict
        if self.scored is None or isinstance(labelled, LeftOut):
            return labelled
        return self.scored.chosen(row, labelled)

    def _verdict(self, row: Row) -> int | LeftOut:
        verdict = self._won(row)
        columns = [
            column
            for name, columns in self.numbers.items()
            for column in columns
            if not name.startswith(SCORES)  # an image without a score makes its row unusable
        ]
        if isinstance(verdict, int) and any(_says_nothing(row.values[name]) for name in columns):
            return LeftOut.UNLABELLED
        return verdict

    def _won(self, row: Row) -> int | LeftOut:
        if self.has_label is not None and not _truth(row.values[self.has_label]):
            return LeftOut.UNLABELLED
        if self.preferred is not None:
            return self._named(row)
        if self.scores is None:
            return 0
        first, second = (self._score(row, name) for name in self.scores)
        if first is None or second is None:
            return LeftOut.UNLABELLED
        if first == second:
            return LeftOut.TIE
        return int((second > first) != self.lower_is_better)

    def _score(self, row: Row, name: str) -> float | None:
        value = row.values[name]
        if value is None or value == b"" or value == "":
            return None
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _malformed(f"{name} is {shortly(value)}, expected a number") from None
        if math.isnan(score):
            return None
        if self.allowed_scores and score not in self.allowed_scores:
            allowed = ", ".join(f"{value:g}" for value in self.allowed_scores)
            raise _malformed(
                f"{name} is {score:g} (allowed: {allowed}). If these numbers are scores of another "
                "kind, name them under data.columns with data.kind: parquet"
            )
        return score

    def _named(self, row: Row) -> int | LeftOut:
        assert self.preferred is not None
        given = _text(row.values[self.preferred])
        value = given.strip().lower()
        names = [name.lower() for name in self.images]
        if value in names:
            return names.index(value)
        if value == "tie":
            return LeftOut.TIE
        if value == "":
            return LeftOut.UNLABELLED
        raise _malformed(
            f"{self.preferred} is {shortly(given)} (allowed: {', '.join(self.images)}, tie). A "
            "number could mean either image: give one score for each under data.columns"
        )

    def pair(self, row: Row, base: Path | None) -> ImagePair | LeftOut:
        """The row as a preference, or why it holds none.

        Args:
            row: with the values of all columns.
            base: folder that relative image paths start from, unless the row has its own.

        Raises:
            UnusableRowError: a value is none that its column may have.
        """
        chosen = self.chosen(row)
        if isinstance(chosen, LeftOut):
            return chosen
        images = []
        for number, name in enumerate(self.images):
            try:
                images.append(encoded_image(row.values[name], row.folder or base))
            except BadImageError as error:
                view = "chosen" if number == chosen else "rejected"
                detail = f"{name}: {error.detail}"
                raise UnusableRowError(error.reason, detail, view) from None
        preferred = images.pop(chosen)
        caption = self.caption(row)
        return ImagePair(
            sample_id=self.sample_id(row),
            prompt=caption,
            chosen=preferred,
            rejected=images[0] if images else None,
            strength=self.strength_of(row),
            own_prompts=self._own_prompts(row, chosen, caption),
            user=None if self.user is None else self._user(row),
        )

    def _user(self, row: Row) -> str:
        assert self.user is not None
        found = _text(row.values[self.user]).strip()
        if not found:
            raise _malformed(f"{self.user} is empty, and data.users asks for who gave the verdict")
        return found

    def _own_prompts(self, row: Row, chosen: int, caption: str) -> dict[str, str]:
        if self.scored is None:
            return {}
        images = (chosen, 1 - chosen)
        prompts = {
            side: self.scored.prompt(row, image, caption)
            for side, image in zip(self.sides, images, strict=False)
        }
        return {side: prompt for side, prompt in prompts.items() if prompt is not None}

    def strength_of(self, row: Row) -> Strength:
        """How sure a row's preference is; the same with the light columns alone.

        Args:
            row: that holds a preference.

        Raises:
            UnusableRowError: a number is missing, or none that it can be.
        """
        verdict, chosen = self._verdict(row), self.chosen(row)
        return self.strength.of(
            self._numbers(row, chosen if isinstance(chosen, int) else 0),
            keeps_ties=self.keep_ties,
            tie=verdict is LeftOut.TIE,
            importance=self._importance(row),
        )

    def _numbers(self, row: Row, chosen: int) -> Numbers:
        """What `strength` reads, each as (chosen, rejected), the higher the better."""
        found = {name: self._both(row, columns, chosen) for name, columns in self.numbers.items()}
        if LABELS in self.strength.reads:
            assert self.scores is not None, "it was checked when the data was opened"
            first, second = self._both(row, self.scores, chosen)
            found[LABELS] = (-first, -second) if self.lower_is_better else (first, second)
        return found

    def _both(self, row: Row, columns: Sequence[str], chosen: int) -> tuple[float, float]:
        sides = number_pair(row.values, columns)
        return sides[chosen], sides[1 - chosen]

    def _importance(self, row: Row) -> float | None:
        if self.pairs_per_prompt is None:
            return None
        count = _text(row.values[self.pairs_per_prompt])
        if not (count.isascii() and count.isdecimal() and len(count) < 16 and int(count)):
            raise _malformed(
                f"{self.pairs_per_prompt} is {shortly(count)}, expected a count of at least 1 "
                "(data.weighting per_prompt divides by it; uniform does not)"
            )
        return 1.0 / int(count)


_RANK = re.compile(r"(^|[^a-z])ranks?([^a-z]|$)")


def smaller_wins(scores: Collection[str], wish: bool | None) -> bool:
    """Whether the smaller number is the better one: as wished, or because it is a rank.

    Args:
        scores: names of the columns of numbers.
        wish: of the config; None goes by the names.
    """
    if wish is not None:
        return wish
    return bool(scores) and all(_RANK.search(name.lower()) for name in scores)


def _says_nothing(value: Any) -> bool:
    return value is None or value != value or value in (b"", "")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _truth(value: Any) -> bool:
    """Tar members are text, in which `0` and `False` are not empty."""
    return _text(value).strip().lower() not in ("", "0", "0.0", "false", "none", "nan")


def _malformed(detail: str) -> UnusableRowError:
    return UnusableRowError(SkipReason.MALFORMED, detail)
