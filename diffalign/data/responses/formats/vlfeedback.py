"""VLFeedback: four responses by different models, each rated from 1 to 5 in three respects.

Columns are those of MMInstruction/VLFeedback: `prompt`, `img_path` (or `image`), `completions`
([{model, response, annotations: {Helpfulness, Ethical Considerations, Visual Faithfulness:
{Rating, Rationale}}}, ...]). Every two responses of a row whose mean ratings differ make a pair; a
tie makes none unless ties are kept, and neither does a response without three ratings.

Source: Li et al. 2023, arXiv:2312.10665 (Silkie): the mean of the three ratings decides, and ties
are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import (
    Comparison,
    malformed,
    records_of,
    turns_of,
    without_end_tokens,
)
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.skipping import LeftOut

_ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


class VLFeedback(AbstractMapping):
    """`prompt`, `completions`, and `image` or `img_path`."""

    needs: ClassVar[frozenset[str]] = frozenset({"prompt", "completions"})
    scored: ClassVar[bool] = True
    image_columns: ClassVar[tuple[str, ...]] = ("image", "img_path", "images")
    summary: ClassVar[str] = (
        "prompt from prompt, a pair of every two of completions, preferred is the one with the "
        f"larger mean of {', '.join(_ASPECTS)}"
    )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison | LeftOut]:
        turns = turns_of(values["prompt"])
        rated = [_rated(c) for c in records_of(values["completions"], "completions")]
        found: list[Comparison | LeftOut] = []
        for (one, first), (other, second) in itertools.combinations(rated, 2):
            if first is None or second is None:
                found.append(LeftOut.UNLABELLED)
            else:
                chosen, rejected = (one, other) if first >= second else (other, one)
                responses = {"chosen": chosen, "rejected": rejected}
                scores = (max(first, second), min(first, second))
                found.append(Comparison(turns=turns, responses=responses, scores=scores))
        return found


def _rated(completion: Any) -> tuple[str, float | None]:
    """A response and the mean of its ratings; None where one is missing."""
    if not isinstance(completion, Mapping):
        raise malformed(f"expected a completion, found {completion!r:.60}")
    annotations = completion.get("annotations") or {}
    response = without_end_tokens(str(completion.get("response") or ""))
    try:
        ratings = [float(annotations[aspect]["Rating"]) for aspect in _ASPECTS]
    except (KeyError, TypeError, ValueError, OverflowError):
        return response, None
    return response, sum(ratings) / len(ratings)
