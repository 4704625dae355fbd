"""What the columns of a row mean: which is the prompt, which the images, and which image won."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.decoding import BadImageError, EncodedImage, encoded_image
from diffalign.data.rows import Row
from diffalign.data.skipping import LeftOut, SkipReason, UnusableRowError
from diffalign.errors import DataError, did_you_mean
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
    preference: float = 1.0
    """Probability that the chosen side is the preferred one; one half for a tie that is kept."""
    importance: float = 1.0
    """How much the pair counts, relative to others."""


PAIR_VIEWS = ("chosen", "rejected")
"""The views that a pair offers, in the order of every batch."""

PROMPT_NAMES = ("caption", "prompt", "original_prompt", "text")
"""Columns that are taken for the prompt, first match first."""


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
        ]

    def all(self) -> list[str]:
        """Every column that is read."""
        return [*self.light(), *self.images]

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
        return (
            f"prompt from {self.prompt}, images from {' and '.join(self.images)}, "
            f"{self.describe_preference()}{ties}{weights}"
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
        return 0 if verdict is LeftOut.TIE and self.keep_ties else verdict

    def _verdict(self, row: Row) -> int | LeftOut:
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
        return ImagePair(
            sample_id=self.sample_id(row),
            prompt=self.caption(row),
            chosen=preferred,
            rejected=images[0] if images else None,
            preference=0.5 if self._verdict(row) is LeftOut.TIE else 1.0,
            importance=self._importance(row),
        )

    def _importance(self, row: Row) -> float:
        if self.pairs_per_prompt is None:
            return 1.0
        count = _text(row.values[self.pairs_per_prompt])
        if not (count.isascii() and count.isdecimal() and len(count) < 16 and int(count)):
            raise _malformed(
                f"{self.pairs_per_prompt} is {shortly(count)}, expected a count of at least 1 "
                "(data.weighting per_prompt divides by it; uniform does not)"
            )
        return 1.0 / int(count)


PICKAPIC = PairColumns(
    prompt="caption",
    images=("jpg_0", "jpg_1"),
    scores=("label_0", "label_1"),
    allowed_scores=(0.0, 0.5, 1.0),
)
"""Pick-a-Pic v1 and v2, and their mirrors (`diffalign.hub`)."""

PICKAPIC_PAIRS_PER_PROMPT = "num_example_per_prompt"
"""How often Pick-a-Pic asked about a prompt."""

PICKAPIC_IDENTITY = ("ranking_id", "image_0_uid", "image_1_uid")
"""One ranking compares several pairs of images, and an image takes part in several rankings."""

_LABEL = re.compile(r"label|prefer|winner|better|score|rank|vote|rating|choice$")
"""In the name of a column that may say which image won."""

_PATTERNS: tuple[dict[str, Any], ...] = (
    {"images": ("chosen", "rejected")},
    {"images": ("image1", "image2"), "scores": ("label1", "label2")},
    {"images": ("image1", "image2"), "scores": ("score1", "score2")},
    {"images": ("image1", "image2"), "scores": ("votes_image1", "votes_image2")},
    {
        "images": ("image1", "image2"),
        "scores": ("weighted_results_image1_preference", "weighted_results_image2_preference"),
    },
    {"images": ("image1", "image2"), "preferred": "preferred"},
    {"images": ("image_1", "image_2"), "scores": ("label_1", "label_2")},
    {"images": ("image_1", "image_2"), "scores": ("score_1", "score_2")},
    {"images": ("image_0", "image_1"), "scores": ("label_0", "label_1")},
    {"images": ("image_0", "image_1"), "scores": ("score_0", "score_1")},
    {"images": ("path1", "path2"), "scores": ("label1", "label2")},
    {"images": ("path1", "path2"), "scores": ("score1", "score2")},
    {"images": ("path1", "path2"), "unless": _LABEL},
    {"images": ("chosen",)},
    {"images": ("image",)},
)
"""Further names in use; the `votes` and `weighted_results` are those of the Rapidata sets, and
`path1` is the preferred image of HPDv3, unless another column may say who won. The last two are
preferred images alone, the very last as sets for fine-tuning name them."""

KNOWN_NAMES = tuple(
    dict.fromkeys(
        (
            *PROMPT_NAMES,
            *PICKAPIC.images,
            *(PICKAPIC.scores or ()),
            *(name for p in _PATTERNS for name in (*p["images"], *p.get("scores", ()))),
        )
    )
)
"""All names that a mapping can be recognised by, for hints at misspellings."""


def pickapic_columns(names: Collection[str], *, lower_is_better: bool | None) -> PairColumns | None:
    """Pick-a-Pic's mapping, where a data set has its columns."""
    prompt = next((name for name in PROMPT_NAMES if name in names), None)
    needed = {*PICKAPIC.images, *(PICKAPIC.scores or ())}
    if prompt is None or not needed <= set(names):
        return None
    has_identity = set(PICKAPIC_IDENTITY) <= set(names)
    return PairColumns(
        prompt=prompt,
        images=PICKAPIC.images,
        scores=PICKAPIC.scores,
        allowed_scores=PICKAPIC.allowed_scores,
        has_label="has_label" if "has_label" in names else None,
        identity=PICKAPIC_IDENTITY if has_identity else (),
        pairs_per_prompt=PICKAPIC_PAIRS_PER_PROMPT if PICKAPIC_PAIRS_PER_PROMPT in names else None,
        lower_is_better=bool(lower_is_better),
    )


def general_columns(
    configured: Mapping[str, str], names: Collection[str], *, lower_is_better: bool | None
) -> PairColumns | None:
    """The mapping under `data.columns`, or else the first pattern in use that a data set fits.

    Pick-a-Pic's names are not among the patterns.

    Raises:
        DataError: `data.columns` is incomplete or names a column that does not exist.
    """
    if configured:
        return _configured_columns(configured, names, lower_is_better=lower_is_better)
    prompt = next((name for name in PROMPT_NAMES if name in names), None)
    for pattern in _PATTERNS:
        unless = pattern.get("unless")
        if unless is not None and any(unless.search(name.lower()) for name in names):
            continue
        preferred = pattern.get("preferred")
        needed = {*pattern["images"], *pattern.get("scores", ()), *filter(None, [preferred])}
        if prompt is not None and needed <= set(names):
            lower = smaller_wins(pattern.get("scores", ()), lower_is_better)
            given = {key: value for key, value in pattern.items() if key != "unless"}
            return PairColumns(prompt=prompt, lower_is_better=lower, **given)
    return None


def find_columns(
    configured: Mapping[str, str], names: Collection[str], *, lower_is_better: bool | None
) -> PairColumns | None:
    """Whichever mapping fits, Pick-a-Pic's included: for layouts that have one reader."""
    pickapic = None if configured else pickapic_columns(names, lower_is_better=lower_is_better)
    return pickapic or general_columns(configured, names, lower_is_better=lower_is_better)


def _configured_columns(
    configured: Mapping[str, str], names: Collection[str], *, lower_is_better: bool | None
) -> PairColumns:
    forms = (
        {"prompt", "chosen", "rejected"},
        {"prompt", "first", "second", "first_score", "second_score"},
        {"prompt", "chosen"},
    )
    if set(configured) not in forms:
        of_groups = {"prompt", "images", "scores"}  # see `groups`, which comes first
        allowed = ", or ".join(" ".join(sorted(form)) for form in (*forms, of_groups))
        raise DataError(
            f"data.columns has {' '.join(sorted(configured))}; it needs exactly {allowed}"
        )
    for key, name in configured.items():
        if name not in names:
            raise DataError(
                f"data.columns.{key} is {name}, and the data set has {', '.join(names)}."
                f"{did_you_mean(name, names)}"
            )
    if "chosen" in configured:
        return PairColumns(
            prompt=configured["prompt"],
            images=tuple(configured[side] for side in PAIR_VIEWS if side in configured),
            lower_is_better=bool(lower_is_better),
        )
    scores = (configured["first_score"], configured["second_score"])
    return PairColumns(
        prompt=configured["prompt"],
        images=(configured["first"], configured["second"]),
        scores=scores,
        lower_is_better=smaller_wins(scores, lower_is_better),
    )


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


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _truth(value: Any) -> bool:
    """Tar members are text, in which `0` and `False` are not empty."""
    return _text(value).strip().lower() not in ("", "0", "0.0", "false", "none", "nan")


def _malformed(detail: str) -> UnusableRowError:
    return UnusableRowError(SkipReason.MALFORMED, detail)
