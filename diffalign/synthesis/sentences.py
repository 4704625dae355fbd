"""A response as sentences."""

from __future__ import annotations

import re

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand, as [start, end) in characters.

    A sentence ends after `.`, `!` or `?` before white space, or with the text. Abbreviations such
    as `Dr.` end one too: no language data is needed for it.
    """
    return [match.span() for match in _SENTENCE.finditer(text.rstrip())]
