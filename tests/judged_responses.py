"""A form of data that offers what every method asks for, and a data set of it.

As a mapping it is `responses.kind: tests.judged_responses`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.responses.formats.base import AbstractMapping, Comparison
from diffalign.data.responses.records import IMAGE, Span, Turn
from tests.responses import SIZES, random_image

IMAGES = (1, 3, 0, 3, 1, 0)
"""Of each row."""
_RESPONSES = {
    "chosen": ("a red cat sits here", "two cats and a table", "the table"),
    "rejected": ("a dog sits here", "T", "the cat, the table"),
    "revised": ("a red cat", "two cats", "a table"),
}
_LABELS = {
    "chosen": "no_hallucination",
    "rejected": "hallucination",
    "revised": "image_recognition_error",
}


class JudgedResponses(AbstractMapping):
    """`question`, three responses, images, and others in their place."""

    needs: ClassVar[frozenset[str]] = frozenset({"question", *_RESPONSES, "retrieved"})
    replacements: ClassVar[Mapping[str, str]] = {"retrieved": "retrieved"}
    responses: ClassVar[tuple[str, ...]] = tuple(_RESPONSES)
    summary: ClassVar[str] = "responses, each judged as a whole"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        responses = {name: values[name] for name in _RESPONSES}
        return [
            Comparison(
                turns=(Turn(role="user", text=values["question"]),),
                responses=responses,
                spans={
                    name: (Span(start=0, end=len(text), label=_LABELS[name], score=2),)
                    for name, text in responses.items()
                },
            )
        ]


def write_judged_responses(folder: Path) -> Path:
    """Six rows about one image, three, or none."""
    for number in range(len(SIZES)):
        random_image("own", number, size=SIZES[number]).save(folder / f"own-{number}.png")
        random_image("other", number, size=SIZES[0]).save(folder / f"other-{number}.png")
    rows = [
        {
            "question": IMAGE * images + "What is it?" + " Look!" * number,
            "images": [f"own-{place}.png" for place in range(images)],
            "retrieved": [f"other-{place}.png" for place in range(images)],
            **{name: texts[number % len(texts)] for name, texts in _RESPONSES.items()},
        }
        for number, images in enumerate(IMAGES)
    ]
    path = folder / "responses.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
