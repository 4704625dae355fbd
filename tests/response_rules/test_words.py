"""Tokens and singulars: what the rules make of plain English; what libraries are asked for."""

from __future__ import annotations

import sys
import types

import pytest

from diffalign.errors import ConfigError
from diffalign.response_rules.words import rule_singular, rule_tokens, singulariser, tokeniser


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("dogs", "dog"),
        ("policemen", "policeman"),
        ("people", "person"),
        ("grandchildren", "grandchild"),
        ("geese", "goose"),
        ("mice", "mouse"),
        ("knives", "knife"),
        ("calves", "calf"),
        ("puppies", "puppy"),
        ("doggies", "doggie"),
        ("benches", "bench"),
        ("toothbrushes", "toothbrush"),
        ("boxes", "box"),
        ("buses", "bus"),
        ("buffaloes", "buffalo"),
        ("glasses", "glass"),
        ("horses", "horse"),
        ("scissors", "scissors"),
        ("sheep", "sheep"),
        ("dog", "dog"),
    ],
)
def test_plurals_of_objects_become_singular(plural, singular):
    assert rule_singular(plural) == singular


@pytest.mark.parametrize(
    ("word", "cut"), [("bus", "bu"), ("glass", "glas"), ("tennis", "tenni"), ("ties", "ty")]
)
def test_words_that_the_published_singulariser_cuts_are_cut(word, cut):
    assert rule_singular(word) == cut


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a dog, a cat.", ["a", "dog", ",", "a", "cat", "."]),
        ("a well-lit room and/or hall", ["a", "well-lit", "room", "and/or", "hall"]),
        ("the dog's bowl", ["the", "dog", "'s", "bowl"]),
        ('"a bird"', ['"', "a", "bird", '"']),
        ("two dogs. one cat", ["two", "dogs", ".", "one", "cat"]),
    ],
)
def test_texts_are_parted_into_words_and_signs(text, tokens):
    assert rule_tokens(text) == tokens


def test_an_absent_library_is_named_with_its_remedy(monkeypatch):
    for name in ("nltk", "textblob", "textblob.en", "textblob.en.inflect"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"nltk.*pip install 'diffalign\[language\]'; .*=rules"):
        tokeniser("nltk")
    with pytest.raises(ConfigError, match=r"textblob.*'diffalign\[language\]'; .*=rules"):
        singulariser("textblob")


def test_absent_data_of_a_library_is_named_with_its_remedy(monkeypatch):
    def without_data(text: str) -> list[str]:
        raise LookupError("Resource punkt_tab not found")

    monkeypatch.setitem(sys.modules, "nltk", types.SimpleNamespace(word_tokenize=without_data))
    with pytest.raises(ConfigError, match=r"python -m nltk.downloader punkt_tab; .*=rules"):
        tokeniser("nltk")


def test_libraries_that_are_there_are_used(monkeypatch):
    inflect = types.SimpleNamespace(singularize=lambda word: word.upper())
    for name in ("textblob", "textblob.en"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "textblob.en.inflect", inflect)
    monkeypatch.setitem(sys.modules, "nltk", types.SimpleNamespace(word_tokenize=str.split))
    assert singulariser("textblob")("dogs") == "DOGS"
    assert tokeniser("nltk")("a dog.") == ["a", "dog."]
