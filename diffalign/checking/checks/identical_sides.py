"""Pairs whose two sides are one and the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, of_all
from diffalign.checking.rows import Examined, Kind, SeenAt


@dataclass(frozen=True, kw_only=True)
class IdenticalSides(AbstractCheck):
    """Chosen and rejected image with the same bytes. Identical responses are unusable rows."""

    title: ClassVar[str] = "Identical sides"
    of: ClassVar[frozenset[Kind]] = frozenset({"images"})

    def look(self, data: Examined) -> Outcome:
        found = [
            (number, row)
            for number, row in data.pairs
            if len(row.digests) == 2 and len(set(row.digests)) == 1
        ]
        if not found:
            return Outcome(figures={"pairs of one image": 0})
        finding = Finding(
            name="identical_sides",
            severity="harmful",
            count=len(found),
            what=f"{of_all(len(found), len(data.pairs), 'pairs', 'show')} the same image on both "
            f"sides",
            harm="a label between them says nothing, and only adds noise",
            advice="take them out, and see how the two came to be one file",
            rows=[row.name for _, row in found],
            examples=[[SeenAt(number, side) for side in row.images] for number, row in found],
        )
        return Outcome(figures={"pairs of one image": len(found)}, findings=[finding])
