"""The contract of a published set of prompts, and which one a file holds."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign import components


@dataclass(frozen=True, kw_only=True)
class AbstractPromptSet(abc.ABC):
    """A set as it was published: how its file is recognised, and what divides its prompts."""

    columns: ClassVar[frozenset[str]]
    """By which a table or an object of it is recognised, in lower case; empty where it has none."""
    size: ClassVar[int]
    """Prompts of the whole set."""
    files: ClassVar[tuple[str, ...]] = ()
    """Names of its files, where it has several or where they are all that tells what it is."""

    @abc.abstractmethod
    def categories(self, row: Mapping[str, Any], file: Path) -> Mapping[str, str]:
        """What a prompt is filed under: kind of category -> category.

        Args:
            row: its columns, by their names in lower case.
            file: that it stands in.
        """

    def recognises(self, columns: Collection[str], file: Path) -> bool:
        """Whether a file is one of this set.

        Args:
            columns: of its first row, in lower case; empty where it is a list of texts.
            file: its path.
        """
        if self.files and file.name not in self.files:
            return False
        return self.columns <= frozenset(columns) and bool(columns or self.files)


def recognised(columns: Collection[str], file: Path) -> AbstractPromptSet | None:
    """The published set that a file looks like; None where it looks like none."""
    known = (find_set(kind) for kind in components.kinds(AbstractPromptSet))
    return next((each for each in known if each.recognises(columns, file)), None)


def find_set(name: str) -> AbstractPromptSet:
    """The set of that name.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    return components.find(AbstractPromptSet, name)()  # type: ignore[type-abstract]
