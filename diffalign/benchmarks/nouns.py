"""The nouns of a response, and whether two of them mean nearly the same.

AMBER was published with nltk's tagger and WordNet lemmas for the one and spaCy's word vectors for
the other. Both need data files of hundreds of megabytes, so each has a plain stand-in, which has to
be asked for by name and is named in every result: its figures are not those of the papers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

from diffalign.benchmarks.words import (
    import_language_package,
    rule_singular,
    rule_tokens,
    with_nltk_data,
)
from diffalign.errors import ConfigError

NounExtractor = Callable[[str], list[str]]
Similar = Callable[[str, str], bool]

NounsName = Literal["nltk", "spacy", "relation"]
SimilarityName = Literal["spacy", "equality"]

SPACY_MODEL = "en_core_web_lg"
SIMILAR = 0.8
"""Cosine similarity above which AMBER takes two words for one: `--similarity_score` of its code."""


def noun_extractor(name: NounsName, known: Collection[str]) -> NounExtractor:
    """A function from a text to the lemmas of its nouns, in their order, repetitions included.

    Args:
        name: nltk as published; spacy; or relation, which takes every word whose singular is known
            for a noun and needs nothing.
        known: the words of `relation.json`.

    Raises:
        ConfigError: the package or its data is not installed; says how to get it.
    """
    if name == "relation":
        return functools.partial(_known_words, known=known)
    if name == "spacy":
        return functools.partial(_spacy_nouns, _spacy_model("nouns=spacy", "nouns=relation"))
    nltk = import_language_package("nltk", asked_by="nouns=nltk", instead="nouns=relation")
    lemmatise = nltk.stem.WordNetLemmatizer().lemmatize
    return with_nltk_data(
        lambda text: [
            lemmatise(word)
            for word, tag in nltk.pos_tag(nltk.word_tokenize(text))
            if tag.startswith("NN")
        ],
        data="punkt_tab averaged_perceptron_tagger_eng wordnet",
        instead="nouns=relation",
    )


def similarity(name: SimilarityName, *, threshold: float = SIMILAR) -> Similar:
    """Whether two words mean nearly the same.

    Args:
        name: spacy as published; or equality, which needs nothing.
        threshold: cosine similarity above which they do, for spacy.

    Raises:
        ConfigError: the package or its data is not installed; says how to get it.
    """
    if name == "equality":
        return str.__eq__
    parsed = functools.cache(_spacy_model("similarity=spacy", "similarity=equality"))

    @functools.cache
    def similar(one: str, other: str) -> bool:
        return bool(parsed(one).similarity(parsed(other)) > threshold)

    return similar


def _known_words(text: str, known: Collection[str]) -> list[str]:
    words = (word if word in known else rule_singular(word) for word in rule_tokens(text))
    return [word for word in words if word in known]


def _spacy_nouns(model: Any, text: str) -> list[str]:
    return [token.lemma_ for token in model(text) if token.tag_.startswith("NN")]


def _spacy_model(asked_by: str, instead: str) -> Any:
    spacy = import_language_package("spacy", asked_by=asked_by, instead=instead)
    try:
        return spacy.load(SPACY_MODEL)
    except OSError as error:
        raise ConfigError(
            f"{asked_by} needs spaCy's model {SPACY_MODEL}: "
            f"python -m spacy download {SPACY_MODEL}; or do without it: {instead}, "
            "whose figures are not those of the papers"
        ) from error
