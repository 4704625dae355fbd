"""Names of columns in use for two images a row, Pick-a-Pic's among them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from diffalign.data.pairs.columns import PAIR_VIEWS, PairColumns, smaller_wins
from diffalign.errors import DataError, did_you_mean

PROMPT_NAMES = ("caption", "prompt", "original_prompt", "text")
"""Columns that are taken for the prompt, first match first."""


PICKAPIC = PairColumns(
    prompt="caption",
    images=("jpg_0", "jpg_1"),
    scores=("label_0", "label_1"),
    allowed_scores=(0.0, 0.5, 1.0),
)
"""Pick-a-Pic v1 and v2, and their mirrors (`diffalign.hub`)."""

_VOTES = ("votes_0", "votes_1")
"""Next to Pick-a-Pic's labels, as `diffalign label` writes them: how many people chose each image,
where a label says only which has more."""

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
    {"images": ("image_0", "image_1"), "scores": ("votes_0", "votes_1")},
    {"images": ("image_1", "image_2"), "scores": ("votes_1", "votes_2")},
    {
        "images": ("jpg_0", "jpg_1"),
        "scores": ("votes_0", "votes_1"),
        "unless": re.compile("^label_[01]$"),  # Pick-a-Pic's, with the votes next to its labels
    },
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
    counted = set(_VOTES) <= set(names)
    return PairColumns(
        prompt=prompt,
        images=PICKAPIC.images,
        scores=_VOTES if counted else PICKAPIC.scores,
        allowed_scores=() if counted else PICKAPIC.allowed_scores,
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
