"""The parts of a response that say what is to be seen: objects and attributes.

spaCy's parser tells noun phrases, numbers and adjectives. Where it is missing there is a substitute
without language data, which is named in every row: all words but those of a closed list of function
words.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.errors import ConfigError

Spans = list[tuple[int, int]]
"""[start, end) in characters, in order, apart from each other."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every all both either neither no not yes
    i you he she it we they me him her us them my your his its our their one who whom whose
    which what there here am is are was were be been being do does did having have has had
    will would shall should can could may might must and or but nor so yet if then than as while
    because although though since when where whether how why of to for by with from into at also
    very too just only please
    """.split()  # noqa: SIM905
)
_SEEN = frozenset({"ADJ", "NUM"})


@dataclass(frozen=True, kw_only=True)
class PhraseConfig:
    """How phrases are found."""

    kind: Literal["auto", "spacy", "words"] = "auto"
    """spacy parses; words takes runs of words that are no function words. auto takes spacy where
    it and its model are installed, and says what it took."""
    model: str = "en_core_web_sm"
    """Of spaCy."""

    @property
    def chosen(self) -> Literal["spacy", "words"]:
        """The kind that auto is on this machine."""
        if self.kind != "auto":
            return self.kind
        return "words" if self._missing() else "spacy"

    @property
    def name(self) -> str:
        """Name of the finder, as rows have it."""
        return f"spacy {self.model}" if self.chosen == "spacy" else "runs of content words"

    def check(self) -> None:
        """Raise ConfigError where spaCy is asked for by name and missing."""
        missing = self._missing()
        if self.chosen == "spacy" and missing:
            raise ConfigError(
                f"phrases.kind is spacy, and {missing[0]} is not installed: {missing[1]}; or do "
                f"without it: phrases.kind=words"
            )

    def open(self) -> Callable[[str], Spans]:
        """A function from a text to its phrases."""
        self.check()
        if self.chosen == "words":
            return content_words
        import spacy

        return functools.partial(_parsed_phrases, spacy.load(self.model))

    def _missing(self) -> tuple[str, str] | None:
        """The parts of spaCy that are missing, and how to get them."""
        if importlib.util.find_spec("spacy") is None:
            return "spaCy", "pip install 'diffalign[language]'"
        if importlib.util.find_spec(self.model) is None:
            return f"its model {self.model}", f"python -m spacy download {self.model}"
        return None


def content_words(text: str) -> Spans:
    """Runs of words that are no function words; what is between words of a run is a space."""
    runs: Spans = []
    for match in _WORD.finditer(text):
        if match[0].lower() in _FUNCTION_WORDS:
            continue
        start, end = match.span()
        if runs and text[runs[-1][1] : start] == " ":
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def blanked(text: str, spans: Spans, mark: str) -> str:
    """A text with a mark in place of each of some parts."""
    pieces, after = [], 0
    for start, end in spans:
        pieces += [text[after:start], mark]
        after = end
    return "".join([*pieces, text[after:]])


def _parsed_phrases(model: Any, text: str) -> Spans:
    """Noun phrases without their determiners and pronouns, and adjectives outside of them."""
    document = model(text)
    spans = []
    for chunk in document.noun_chunks:
        words = [word for word in chunk if word.pos_ not in ("DET", "PRON")]
        if words:
            spans.append((words[0].idx, words[-1].idx + len(words[-1].text)))
    for word in document:
        start, end = word.idx, word.idx + len(word.text)
        inside = any(first <= start and end <= last for first, last in spans)
        if word.pos_ in _SEEN and not inside:
            spans.append((start, end))
    return sorted(spans)
