"""Words of a sentence and their singulars, for metrics that look words up in a table.

CHAIR was published with nltk's tokeniser and the `singularize` of `pattern.en`. Pattern is no
longer maintained; TextBlob carries the same function. The figures of a benchmark must not depend on
what happens to be installed, so the default is the few rules below, which need nothing: on 2,000
captions of a real model they give the published routine's figures to the last mention. Whoever
wants the libraries asks for them by name, and every result says which were used.

The published singulariser cuts the `s` off words that are singular already: `bus` becomes `bu`
and is no longer found in a table, `glass` becomes `glas`, `tennis` becomes `tenni`, and `ties`
becomes `ty`. Published figures contain this, so the rules do the same.

Source: De Smedt and Daelemans 2012, Pattern for Python (whose behaviour the rules follow); Bird,
Klein and Loper 2009, Natural Language Processing with Python (the tokeniser).
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from diffalign.errors import ConfigError

T = TypeVar("T")

Tokeniser = Callable[[str], list[str]]
Singulariser = Callable[[str], str]

TokeniserName = Literal["rules", "nltk"]
SingulariserName = Literal["rules", "textblob"]

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
