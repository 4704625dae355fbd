"""Versions of libraries: installed, allowed by this package, and tested with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = "diffalign"
TESTED_SET = "constraints.txt"
"""Names and versions, in the form that `pip install --constraint` takes."""


@dataclass(frozen=True)
class Library:
    """A package that this one depends on."""

    name: str
    installed: str | None
    """None where it is missing."""
    allowed: SpecifierSet
    """By this package's own requirements; empty for an optional package."""
    tested: str | None
    """For this Python and system; None where the tested set does not name it."""

    @property
    def fits(self) -> bool:
        """Whether the installed version is one that this package allows."""
        return self.installed is not None and self.allowed.contains(
            self.installed, prereleases=True
        )

    @property
    def as_tested(self) -> bool:
        return self.tested is None or self.tested == self.installed


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def required() -> dict[str, SpecifierSet]:
    """The versions that this package allows, by name; empty if it is not installed."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    found = (Requirement(line) for line in lines)
    return {
        canonicalize_name(item.name): item.specifier
        for item in found
        if item.marker is None or item.marker.evaluate({"extra": ""})
    }


@cache
def tested() -> dict[str, str]:
    """The tested version of each library, for this Python and system.

    Empty if the list is not part of this installation: a wheel carries it inside the package, a
    checkout next to it.
    """
    package = Path(__file__).parent
    places = (package / TESTED_SET, package.parent / TESTED_SET)
    file = next((place for place in places if place.is_file()), None)
    return {} if file is None else read_constraints(file.read_text(encoding="utf-8"))


def read_constraints(text: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The versions in a list of constraints, each `NAME==VERSION`, by canonical name.

    Args:
        text: of the list; comments and lines whose markers do not hold are left out.
        environment: values of markers, such as python_full_version; this one's where not given.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        content = line.partition("#")[0].strip()
        if not content:
            continue
        item = Requirement(content)
        if item.marker is None or item.marker.evaluate(environment):
            (pin,) = item.specifier
            found[canonicalize_name(item.name)] = pin.version
    return found


def library(name: str) -> Library:
    key = canonicalize_name(name)
    return Library(name, installed(name), required().get(key, SpecifierSet()), tested().get(key))


def advice(error: BaseException) -> str:
    """Advice after an error that may come from the version of a library.

    Args:
        error: of an import or of a call into a library, or one that such an error caused.

    Returns:
        Sentences that name the libraries, the versions that work, and the command that installs
        them; empty where nothing speaks for a version as the cause.
    """
    chain = list(_chain(error))
    libraries = [library(name) for name in sorted(required())]
    outside = [item for item in libraries if not item.fits]
    suspects = outside or [item for item in libraries if not item.as_tested]
    if not outside and not any(map(_may_be_of_versions, chain)):
        return ""
    blamed = [item for item in suspects if _is_named(item, chain)] or suspects
    if not blamed:
        return ""
    works = " ".join(f"'{item.name}{_working(item)}'" for item in blamed if _working(item))
    return (
        f"This may be a matter of versions: {'; '.join(map(_describe, blamed))}. To change it: "
        f"pip install {works}. `diffalign env` compares all versions with the tested ones"
    )


def _describe(item: Library) -> str:
    has = f"{item.name} {item.installed}" if item.installed else f"no {item.name}"
    allowed = "" if item.fits else f", {item.name}{item.allowed} is needed"
    known = f", {item.tested} was tested" if item.tested else ""
    return f"{has} is installed{allowed}{known}"


def _working(item: Library) -> str:
    return f"=={item.tested}" if item.tested else str(item.allowed)


def _may_be_of_versions(error: BaseException) -> bool:
    if isinstance(error, ImportError):
        return (error.name or "").partition(".")[0] != PROJECT
    said = re.search(r"\bversions?\b|\bup(grade|date)\b", str(error), re.IGNORECASE)
    return isinstance(error, (AttributeError, TypeError)) or said is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_named(item: Library, chain: list[BaseException]) -> bool:
    told = " ".join(f"{getattr(link, 'name', None) or ''} {link}" for link in chain)
    module = item.name.replace("-", "_")
    return module.lower() in told.replace("-", "_").lower()
