"""Images that look alike and are not the same file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, of_all
from diffalign.checking.rows import Examined, SeenAt
from diffalign.checking.similarity import near_duplicates
from diffalign.ranges import AtLeast, Between


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(AbstractCheck):
    """Files of other bytes whose perceptual hash and colours are nearly equal: saved anew, scaled,
    slightly cut or edited. Looked for among the images that are decoded."""

    title: ClassVar[str] = "Near-duplicate images"

    bits: Annotated[int, Between(0, 16)] = 4
    """Bits of 64 in which the perceptual hashes (pHash) of two images may differ."""
    levels: Annotated[float, AtLeast(0)] = 6.0
    """Root mean square difference of the two at 8 x 8 pixels, of 255: the hash sees no colours."""

    def look(self, data: Examined) -> Outcome:
        digests = list(data.looks)
        if not digests:
            return Outcome(passed_over="no image was decoded (images: none)")
        groups = near_duplicates(list(data.looks.values()), bits=self.bits, levels=self.levels)
        named = [[digests[member] for member in group] for group in groups]
        sides = _of_one_pair(data, named)
        across = _across_rows(data, named)
        findings = []
        if sides and data.kind == "images":
            findings.append(self._sides(data, sides))
        if across:
            findings.append(self._across(data, across, len(digests)))
        return Outcome(
            figures={
                "images looked at": len(digests),
                "near-duplicates of an image of another row": sum(len(g) - 1 for g in across),
                "pairs of two that look alike": len(sides),
            },
            findings=findings,
            passed_over="" if len(digests) >= len(data.seen) else f"looked at: {data.decoded}",
        )

    def _sides(self, data: Examined, numbers: Sequence[int]) -> Finding:
        return Finding(
            name="similar_sides",
            severity="doubtful",
            count=len(numbers),
            what=f"{of_all(len(numbers), len(data.pairs), 'pairs', 'have')} two sides that look "
            f"alike",
            harm="what is preferred may be no more than how the files were saved",
            advice="look at them, and take out those that a person cannot tell apart",
            rows=[data.rows[number].name for number in numbers],
            examples=[[SeenAt(n, side) for side in data.rows[n].images] for n in numbers],
        )

    def _across(
        self, data: Examined, groups: Sequence[Sequence[SeenAt]], looked_at: int
    ) -> Finding:
        count = sum(len(group) - 1 for group in groups)
        return Finding(
            name="near_duplicates",
            severity="doubtful",
            count=count,
            what=f"{of_all(count, looked_at, 'decoded images', 'look')} nearly like one of another "
            f"row",
            harm="the rows count several times, and may be held out and trained on at once",
            advice="look at them, and keep one of each",
            rows=[data.rows[place.row].name for group in groups for place in group[1:]],
            examples=groups,
        )


def _of_one_pair(data: Examined, groups: Sequence[Sequence[bytes]]) -> list[int]:
    """Numbers of the rows whose chosen and rejected image are in one group."""
    group_of = {digest: number for number, group in enumerate(groups) for digest in group}
    found = []
    for number, row in data.pairs:
        sides = row.digests
        if len(sides) == 2 and sides[0] != sides[1]:
            of = [group_of.get(digest) for digest in sides]
            if of[0] is not None and of[0] == of[1]:
                found.append(number)
    return found


def _across_rows(data: Examined, groups: Sequence[Sequence[bytes]]) -> list[list[SeenAt]]:
    """Of each group the first place of an image, and those of images of other rows."""
    found = []
    for group in groups:
        places = sorted(data.seen[digest][0] for digest in group if digest in data.seen)
        kept: dict[str, SeenAt] = {}
        for place in places:
            kept.setdefault(data.rows[place.row].origin, place)
        if len(kept) > 1:
            found.append(list(kept.values()))
    return found
