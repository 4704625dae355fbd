"""Words of a sentence, their singulars and nouns, for metrics that look words up in a table.

CHAIR was published with nltk's tokeniser and the `singularize` of `pattern.en`. Pattern is no
longer maintained; TextBlob carries the same function. The figures of a benchmark must not depend on
what happens to be installed, so the default is the few rules below, which need nothing: on 2,000
captions of a real model they give the published routine's figures to the last mention. Whoever
wants the libraries asks for them by name, and every result says which were used.

The published singulariser cuts the `s` off words that are singular already: `bus` becomes `bu`
and is no longer found in a table, `glass` becomes `glas`, `tennis` becomes `tenni`, and `ties`
becomes `ty`. Published figures contain this, so the rules do the same.

The nouns of a text and the similarity of two words, which AMBER asks for, were published with
nltk's tagger and WordNet lemmas and with spaCy's word vectors. Both need data files of hundreds of
megabytes, so each has a plain stand-in, which has to be asked for by name and is named in every
result: its figures are not those of the papers.

Source: De Smedt and Daelemans 2012, Pattern for Python (whose behaviour the rules follow); Bird,
Klein and Loper 2009, Natural Language Processing with Python (the tokeniser).
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

from diffalign.errors import ConfigError

T = TypeVar("T")

Tokeniser = Callable[[str], list[str]]
Singulariser = Callable[[str], str]
NounExtractor = Callable[[str], list[str]]
Similar = Callable[[str, str], bool]

TokeniserName = Literal["rules", "nltk"]
SingulariserName = Literal["rules", "textblob"]
NounsName = Literal["nltk", "spacy", "relation"]
SimilarityName = Literal["spacy", "equality"]

SPACY_MODEL = "en_core_web_lg"
SIMILAR = 0.8
"""Cosine similarity above which AMBER takes two words for one: `--similarity_score` of its code."""

_TOKEN = re.compile(r"\w+(?:[-/.]\w+)*|'\w+|[^\w\s]")
"""Words with what holds them together inside, an ending after an apostrophe, or one sign."""

_UNCHANGED = {"scissors", "series", "species", "news"}
_ENDINGS = (
    ("people", "person"),
    ("children", "child"),
    ("men", "man"),
    ("feet", "foot"),
    ("teeth", "tooth"),
    ("geese", "goose"),
    ("oxen", "ox"),
    ("mice", "mouse"),
    ("knives", "knife"),
    ("wives", "wife"),
    ("lives", "life"),
    ("leaves", "leaf"),
    ("loaves", "loaf"),
    ("lves", "lf"),
    ("arves", "arf"),
    ("movies", "movie"),
    ("collies", "collie"),
    ("doggies", "doggie"),
    ("ies", "y"),
    ("shoes", "shoe"),
    ("oes", "o"),
    ("buses", "bus"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("sses", "ss"),
    ("xes", "x"),
    ("s", ""),
)
"""Endings of plurals and what is in their place; the first that fits is taken."""


def rule_tokens(text: str) -> list[str]:
    """Words and signs, parted where nltk's tokeniser parts plain descriptions."""
    return _TOKEN.findall(text)


def rule_singular(word: str) -> str:
    """The singular of a lower-case word by its ending; see the module for what becomes of `bus`."""
    if word in _UNCHANGED:
        return word
    for plural, singular in _ENDINGS:
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return word


def tokeniser(name: TokeniserName) -> Tokeniser:
    """A function from a text to its tokens.

    Raises:
        ConfigError: nltk or its data is not installed; says how to get it.
    """
    if name == "rules":
        return rule_tokens
    nltk = import_language_package("nltk", asked_by="tokeniser=nltk", instead="tokeniser=rules")
    return with_nltk_data(nltk.word_tokenize, data="punkt_tab", instead="tokeniser=rules")


def singulariser(name: SingulariserName) -> Singulariser:
    """A function from a lower-case word to its singular.

    Raises:
        ConfigError: TextBlob is not installed; says how to get it.
    """
    if name == "rules":
        return rule_singular
    inflect = import_language_package(
        "textblob.en.inflect", asked_by="singulariser=textblob", instead="singulariser=rules"
    )
    return functools.cache(inflect.singularize)


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


def import_language_package(module: str, *, asked_by: str, instead: str) -> Any:
    """A module of an optional package for language.

    Args:
        module: dotted name.
        asked_by: the setting that needs it, for the error.
        instead: the setting that does without, for the error.

    Raises:
        ConfigError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{asked_by} needs the package {package}, which is not installed: "
            f"pip install 'diffalign[language]'; or do without it: {instead}"
        ) from error


def with_nltk_data(function: Callable[[str], T], *, data: str, instead: str) -> Callable[[str], T]:
    """A function of nltk, tried once: nltk looks for its data files when it is first called.

    Raises:
        ConfigError: they are missing; says how to get them.
    """
    try:
        function("a dog")
    except LookupError as error:
        raise ConfigError(
            f"nltk lacks its data {data}: python -m nltk.downloader {data}; "
            f"or do without it: {instead}"
        ) from error
    return function
