"""Sizes of images, and whether the larger one wins."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.checking.checks.base import (
    AbstractCheck,
    Figure,
    Finding,
    Outcome,
    Share,
    of_all,
)
from diffalign.checking.rows import CheckedRow, Examined, SeenAt
from diffalign.data.decoding import Size
from diffalign.ranges import AtLeast, Between

_STEPS = (256, 512, 768, 1024, 1536)
_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Sizes(AbstractCheck):
    """A histogram of sizes; images that training would enlarge; sizes that give the label away."""

    title: ClassVar[str] = "Sizes"

    smallest: Annotated[int, AtLeast(1)] | None = None
    """Shorter side, pixels, below which an image is a finding; null takes `data.resolution` of a
    training config, and without one nothing is too small."""
    tolerance: Annotated[float, Between(0, 0.5)] = 0.1
    """How far from one half the share of pairs whose larger image won must be to be a finding."""

    def look(self, data: Examined) -> Outcome:
        sizes = [(place, image.size) for place, image in data.shown() if image.size is not None]
        if not sizes:
            return Outcome(passed_over="there are no images")
        exact = Counter(f"{height} x {width}" for _, (height, width) in sizes)
        shorter = Counter(_step(min(size)) for _, size in sizes)
        rest = len(sizes) - sum(count for _, count in exact.most_common(_LISTED))
        unequal = [row for _, row in data.pairs if _areas_differ(row)]
        figures: dict[str, Figure] = {
            "different sizes": len(exact),
            "pairs of two sizes": len(unequal),
        }
        findings = []
        if unequal:
            share = self._larger(unequal, data.confidence)
            figures["larger image won"] = share
            if share.excludes(0.5, by=self.tolerance):
                findings.append(self._gives_away(share, [row.name for row in unequal]))
        smallest = self.smallest or data.resolution
        small = [place for place, size in sizes if smallest and min(size) < smallest]
        if small and smallest:
            findings.append(self._small(data, small, smallest, len(sizes)))
        return Outcome(
            figures=figures,
            counts={
                "Shorter side, pixels": {name: shorter[name] for name in _steps() if shorter[name]},
                "Height x width": {**dict(exact.most_common(_LISTED)), **_others(rest)},
            },
            findings=findings,
        )

    @staticmethod
    def _larger(rows: Sequence[CheckedRow], confidence: float) -> Share:
        won = 0
        for row in rows:
            chosen, rejected = (_area(image.size) for image in row.images.values())
            won += chosen > rejected
        return Share.of_trials(won, len(rows), confidence)

    @staticmethod
    def _gives_away(share: Share, rows: Sequence[str]) -> Finding:
        larger = share.value > 0.5
        return Finding(
            name="size_bias",
            severity="doubtful",
            count=share.of,
            share=share,
            what=f"Where the two images differ in size the {'larger' if larger else 'smaller'} one "
            f"won in {share.larger} pairs",
            harm="training may learn how sharp an image of that size looks after resizing, and not "
            "what people prefer",
            advice="make both sides of one size, or take these pairs out",
            rows=rows,
        )

    @staticmethod
    def _small(data: Examined, places: Sequence[SeenAt], smallest: int, of: int) -> Finding:
        return Finding(
            name="small_images",
            severity="doubtful",
            count=len(places),
            what=f"{of_all(len(places), of, 'images', 'are')} smaller than {smallest} pixels",
            harm="training enlarges them, and the model learns their blur",
            advice="take them out, or lower data.resolution",
            rows=[f"{data.rows[place.row].name} {place.side}" for place in places],
            examples=[[place] for place in places],
        )


def _areas_differ(row: CheckedRow) -> bool:
    sizes = [image.size for image in row.images.values()]
    if set(row.images) != {"chosen", "rejected"} or None in sizes:
        return False
    return _area(sizes[0]) != _area(sizes[1])


def _area(size: Size | None) -> int:
    assert size is not None
    return size[0] * size[1]


def _step(side: int) -> str:
    return next((name for name, step in zip(_steps(), _STEPS, strict=False) if side < step), _top())


def _steps() -> list[str]:
    between = [f"{low} to {high - 1}" for low, high in itertools.pairwise(_STEPS)]
    return [f"below {_STEPS[0]}", *between, _top()]


def _top() -> str:
    return f"{_STEPS[-1]} and more"


def _others(count: int) -> dict[str, int]:
    return {"others": count} if count else {}
