"""Object HalBench: words of what a judge listed, and figures worked by hand."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from diffalign.benchmarks.object_halbench.rules import (
    check,
    claimed_words,
    double_words,
    halbench_panel,
    is_short,
    parse_objects,
    phrases,
)
from diffalign.errors import ConfigError
from diffalign.intervals import Bootstrap
from diffalign.response_rules.coco_objects import Synonyms

SYNONYMS = Synonyms(
    {
        **dict.fromkeys(("dog", "puppy"), "dog"),
        "cat": "cat",
        "person": "person",
        "orange": "orange",
        "toilet": "toilet",
        **dict.fromkeys(("chair", "seat"), "chair"),
        **dict.fromkeys(("cell phone", "phone"), "cell phone"),
    }
)
DOUBLES = double_words(SYNONYMS)


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ("[]", []),
        ('Here they are:\n["dog"]\n', ["dog"]),
        ('\n["a",\n "b"]\n', ["a", "b"]),
        ('So:\n["a\u2028b"]', ["a\u2028b"]),
    ],
)
def test_lists_are_read(reply, objects):
    assert parse_objects(reply) == objects


@pytest.mark.parametrize(
    "reply", ["dog, cat", "", "()", '["dog"]\nThat is all.', "[1]", '{"a": 1}']
)
def test_other_replies_are_unreadable(reply):
    with pytest.raises(ValueError, match="no JSON list"):
        parse_objects(reply)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (["dogs", "dog", "a puppy"], ["dog", "puppy"]),  # each word once, two words of a class
        (["cell phones"], ["cell phone"]),
        (["group of people"], ["person"]),
        (["orange shirt"], []),  # a run of nouns that is no word of the table
        (["adult dog"], ["dog"]),
        (["toilet", "seat"], ["toilet"]),
        (["seat"], ["seat"]),
        (["Cat"], ["cat"]),
        (["home plate"], []),
        ([], []),
    ],
)
def test_words_of_listed_objects(objects, words):
    assert claimed_words(objects, SYNONYMS, phrases("rules"), DOUBLES) == words


def test_spacy_gives_lemmas_and_runs_of_nouns(monkeypatch):
    tags = {"a": "DT", "red": "JJ", "dogs": "NNS", "of": "IN", "park": "NN", "bench": "NN"}
    lemmas = {"dogs": "dog"}

    def model(text: str):
        return [SimpleNamespace(lemma_=lemmas.get(w, w), tag_=tags[w]) for w in text.split()]

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: model))
    phrase = phrases("spacy")
    assert phrase("red dogs of park bench") == (
        ["a", "red", "dog", "of", "park", "bench"],
        ["dog", "park bench"],
    )
    assert phrase("red")[1] == []


def test_an_absent_model_of_spacy_is_named_with_its_remedy(monkeypatch):
    def load(name: str):
        raise OSError

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ConfigError, match=r"spacy download en_core_web_trf; .*lemmas=rules"):
        phrases("spacy")


def test_responses_of_three_words_are_short():
    assert is_short("A big dog")
    assert not is_short("A big brown dog")


def test_figures_worked_by_hand():
    responses = [
        ("1", "a dog and a puppy and a cat", ["dog", "puppy", "cat"], {"dog"}),  # 1 of 3 wrong
        ("2", "a person here now", ["person"], {"person", "cat"}),
        ("3", "so very nice indeed", [], {"dog"}),  # no object: not in the response level
    ]
    checked = [check(i, a, words, frozenset(truth), SYNONYMS) for i, a, words, truth in responses]
    figures = halbench_panel(checked, Bootstrap(resamples=100)).figures
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {
            "response_level": 100 * 1 / 2,
            "mention_level": 100 * 1 / 4,
            "recall": 100 * (1 + 1 + 0) / (1 + 2 + 1),
            "mean_length": (8 + 4 + 4) / 3,
        }
    )


PUBLISHED = (
    (["man", "horse", "fence"], {"person", "horse"}),
    (["kid", "puppy", "couch", "lamp"], {"person", "couch"}),
    (["sky"], {"bird"}),
    (["toilet", "seat", "bike", "bicycle"], {"toilet", "bicycle"}),
    (["cab", "woman", "laptop"], {"car", "person", "dining table"}),
)
"""Objects that a judge listed, and classes in the image; counted by RLAIF-V's compute_chair."""
REFINED = Synonyms(
    {
        **dict.fromkeys(("person", "man", "woman", "kid"), "person"),
        **dict.fromkeys(("bicycle", "bike"), "bicycle"),
        **dict.fromkeys(("car", "cab"), "car"),
        **dict.fromkeys(("chair", "seat"), "chair"),
        **dict.fromkeys(("dog", "puppy"), "dog"),
        **{name: name for name in ("horse", "couch", "bird", "toilet", "laptop", "dining table")},
    }
)
"""What the published table has of these words."""


def test_five_lists_count_as_the_released_code_counts_them():
    checked = [
        check(
            str(n),
            "a b c d",
            claimed_words(listed, REFINED, phrases("rules"), double_words(REFINED)),
            frozenset(truth),
            REFINED,
        )
        for n, (listed, truth) in enumerate(PUBLISHED)
    ]
    panel = halbench_panel(checked, Bootstrap(resamples=100))
    values = {name: figure.value for name, figure in panel.figures.items()}
    assert values["response_level"] == 50  # 2 of 4: the sky is no object of COCO
    assert panel.counts["hallucinating_answers"] / panel.counts["answers"] == 0.4  # CHAIRs
    assert values["mention_level"] == pytest.approx(18.1818181818)  # bike and bicycle are two
    assert values["recall"] == 80
    assert "seat" not in checked[3].claimed


def test_nothing_but_other_words_leaves_the_response_level_undefined():
    checked = [check("1", "the sky is blue", [], frozenset({"bird"}), REFINED)]
    assert halbench_panel(checked, Bootstrap(resamples=100)).figures["response_level"].value is None
