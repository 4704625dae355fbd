from __future__ import annotations

import pytest

from diffalign.errors import ConfigError
from diffalign.synthesis import phrases
from diffalign.synthesis.phrases import PhraseConfig, blanked, content_words


def test_runs_of_content_words_become_one_blank():
    text = "A big red cat sits on the mat, and it isn't old."
    found = [text[start:end] for start, end in content_words(text)]
    assert found == ["big red cat sits on", "mat", "isn't old"]
    assert blanked(text, content_words(text), "_") == "A _ the _, and it _."


def test_function_words_alone_give_no_blank():
    assert content_words("Yes, it is there.") == []
    assert blanked("Yes.", [], "_") == "Yes."


def test_auto_says_what_it_took(monkeypatch):
    monkeypatch.setattr(phrases.importlib.util, "find_spec", lambda name: None)
    assert PhraseConfig().name == "runs of content words"
    assert PhraseConfig().open() is content_words
    monkeypatch.setattr(phrases.importlib.util, "find_spec", lambda name: object())
    assert PhraseConfig().name == "spacy en_core_web_sm"


@pytest.mark.parametrize(
    ("there", "remedy"),
    [((), r"'diffalign\[language\]'"), (("spacy",), "spacy download en_core_web_sm")],
)
def test_spacy_that_is_asked_for_and_missing_is_refused(monkeypatch, there, remedy):
    monkeypatch.setattr(
        phrases.importlib.util, "find_spec", lambda name: name if name in there else None
    )
    with pytest.raises(ConfigError, match=remedy):
        PhraseConfig(kind="spacy").check()


def test_a_parse_gives_noun_phrases_without_articles_and_adjectives_outside(monkeypatch):
    class Word:
        def __init__(self, idx, text, pos):
            self.idx, self.text, self.pos_ = idx, text, pos

    words = [
        Word(0, "The", "DET"),
        Word(4, "red", "ADJ"),
        Word(8, "cat", "NOUN"),
        Word(12, "is", "AUX"),
        Word(15, "old", "ADJ"),
    ]

    class Document(list):
        noun_chunks = (words[:3],)

    found = phrases._parsed_phrases(lambda text: Document(words), "The red cat is old")
    assert found == [(4, 11), (15, 18)]
