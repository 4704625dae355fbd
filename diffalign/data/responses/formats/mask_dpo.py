"""Mask-DPO: two responses whose sentences are labelled as hallucinated or not.

Fields are those of the authors' JSON lines: `prompt` (messages), `chosen` and `rejected` (messages
or text), `chosen_item` and `rejected_item` ({sents: [...], type: [...]}, a type a sentence:
`hallucination` or `no_hallucination`). Where a response is absent it is its sentences together.
Each sentence becomes a span with its type as label.

Source: Gu et al. 2025, arXiv:2503.02846; open-compass/ANAH, maskdpo/dataset.py. Their set has no
images; an `images` or `image` column is read where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffalign.data.responses.conversation import (
    Comparison,
    compared,
    labelled_sentences,
    malformed,
    turns_of,
    without_end_tokens,
)
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.records import Span


class MaskDPO(AbstractMapping):
    """`prompt`, `chosen_item`, `rejected_item`."""

    needs: ClassVar[frozenset[str]] = frozenset({"prompt", "chosen_item", "rejected_item"})
    images_optional: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "prompt from prompt, labels of sentences from chosen_item, rejected_item"
    )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        labelled = {side: _labelled(values, side) for side in self.responses}
        sides = {side: response for side, (response, _, _) in labelled.items()}
        found = compared(turns_of(values["prompt"]), sides)
        spans = {
            side: _spans(found.responses[side], sentences, labels, side)
            for side, (_, sentences, labels) in labelled.items()
        }
        return [replace(found, spans=spans)]


def _labelled(values: Mapping[str, Any], side: str) -> tuple[Any, list[str], list[str]]:
    """A response, its sentences, and their labels."""
    item = values[f"{side}_item"]
    if not isinstance(item, Mapping) or not {"sents", "type"} <= set(item):
        raise malformed(f"{side}_item has not the fields sents and type: {item!r:.60}", side)
    sentences, labels = (_texts(item[name], f"{side}_item.{name}") for name in ("sents", "type"))
    return values.get(side) or _together(sentences), sentences, labels


def _texts(value: Any, name: str) -> list[str]:
    """A list of strings; null is an empty one."""
    texts = [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise malformed(f"{name} is no list of texts: {value!r:.60}")
    return texts


def _spans(
    response: str, sentences: Sequence[str], labels: Sequence[str], side: str
) -> tuple[Span, ...]:
    try:
        plain = [without_end_tokens(sentence) for sentence in sentences]
        return tuple(labelled_sentences(response, plain, labels))
    except ValueError as error:
        raise malformed(f"{side}_item: {error}", side) from error


def _together(sentences: Sequence[str]) -> str:
    """The text of sentences, with a space between two that have none."""
    text = ""
    for sentence in sentences:
        spaced = not text or text[-1].isspace() or sentence[:1].isspace()
        text += sentence if spaced else f" {sentence}"
    return text
