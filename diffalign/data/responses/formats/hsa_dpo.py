"""HSA-DPO: a question, two responses, and how grave the mistakes of the rejected one are.

Fields are those of the authors' JSON lines: `id`, `question`, `chosen`, `rejected`,
`rejected_score` and perhaps `chosen_score`. A score becomes that of one span over the whole
response, for weights of kind `severity`; it is 1 where a row has none. The image is the file
`ID.jpg`, or the id itself where that has an ending. Sets with a column of images have another form.

Source: Xiao et al. 2024, arXiv:2404.14233; Mr-Loevan/HSA-DPO, train_dpo.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, malformed, turns_of
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.records import Span, Turn


class HSADPO(AbstractMapping):
    """`question`, `chosen`, `rejected`, `rejected_score`, and `id`, which names the image."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"question", "chosen", "rejected", "rejected_score"}
    )
    image_columns: ClassVar[tuple[str, ...]] = ("id",)
    summary: ClassVar[str] = "prompt from question, severity from rejected_score"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        return not {"image", "images"} & set(first)

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {side: values[side] for side in self.responses}
        found = compared(turns_of(values["question"]), sides)
        spans = {
            side: (Span(start=0, end=len(text), score=_score(values, side)),)
            for side, text in found.responses.items()
        }
        return [replace(found, spans=spans)]

    def _shown(self, turns: Sequence[Turn], values: Mapping[str, Any]) -> Sequence[Any]:
        return [None if name is None else _file(name) for name in super()._shown(turns, values)]


def _file(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise malformed(f"id is no name of an image: {name!r:.60}")
    return str(name) if PurePath(str(name)).suffix else f"{name}.jpg"


def _score(values: Mapping[str, Any], side: str) -> float:
    score = values.get(f"{side}_score")
    if score is None:
        return 1.0
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise malformed(f"{side}_score is no number: {score!r:.60}", side)
    return float(score)
