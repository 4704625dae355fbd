"""Responses of one token a word, and sentences of them."""

from __future__ import annotations

import re

import torch

from diffalign.data.responses.chat import EncodedResponse
from diffalign.data.responses.records import Span


def response(text: str) -> EncodedResponse:
    """Each word is a token, with the space before it; the end of the sequence follows."""
    offsets = [match.span() for match in re.finditer(r"\s*\S+", text)]
    offsets.append((len(text), len(text)))
    return EncodedResponse(
        input_ids=torch.arange(len(offsets)), start=0, offsets=torch.tensor(offsets), further={}
    )


def judged(*parts: tuple[str, str | None, float | None]) -> tuple[str, tuple[Span, ...]]:
    """(text, spans) of sentences, each with its label and score, with spaces between."""
    text, spans = "", []
    for sentence, label, score in parts:
        start = len(text)
        text += sentence + " "
        spans.append(Span(start=start, end=start + len(sentence), label=label, score=score))
    return text.rstrip(), tuple(spans)
