"""What a comparison of two models by one scorer came to, and what several of them say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffalign.comparison.compare import Comparison, Place, contradiction
from diffalign.evidence import Looks

_LISTED_MISSING = 5


@dataclass(frozen=True, kw_only=True)
class CategoryResult:
    """One model against the baseline on the prompts of one category."""

    kind: str
    """What the prompts are divided by, such as `challenge`."""
    category: str
    """One value of it, such as `Quantity`."""
    comparison: Comparison


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model against another, most often the baseline, by one scorer."""

    scorer: str
    baseline: str
    model: str
    comparison: Comparison
    holm: float | None = None
    """The p-value, corrected for all comparisons that are made together; None where it is alone."""
    looks: Looks | None = None
    """Earlier looks at the same comparison with fewer pairs; None where this is the first."""
    categories: tuple[CategoryResult, ...] = ()
    """By every category that the prompts have, in the order of the prompts."""

    @property
    def p_value(self) -> float:
        """Corrected where there is more than one comparison."""
        return self.comparison.p_value if self.holm is None else self.holm

    @property
    def plan(self) -> str | None:
        """How many prompts would show a given win rate, in words."""
        needed = self.comparison.needed
        return None if needed is None else needed.in_words

    @property
    def level(self) -> str:
        """Name of the intervals, such as `95% interval`."""
        return f"{self.comparison.confidence:.0%} interval"

    @property
    def warnings(self) -> list[str]:
        """Cautions that belong to the numbers, images without a partner included."""
        comparison = self.comparison
        return [
            *comparison.notes,
            *([] if self.looks is None else [self.looks.in_words]),
            *_missing(self.baseline, comparison.missing_baseline),
            *_missing(self.model, comparison.missing_model),
        ]


def _missing(model: str, places: Sequence[Place]) -> Iterable[str]:
    if places:
        listed = ", ".join(f"{prompt} seed {seed}" for prompt, seed in places[:_LISTED_MISSING])
        more = len(places) - _LISTED_MISSING
        yield (
            f"{len(places)} items are left out, {model} has no score for them: {listed}"
            + (f" and {more} more (all in compare.json)" if more > 0 else "")
        )


def contradictions(results: Sequence[Result]) -> list[str]:
    """See `compare.contradiction`: a sentence for each model of which there is one."""
    by_model: dict[str, dict[str, Comparison]] = {}
    for result in results:
        by_model.setdefault(result.model, {})[result.scorer] = result.comparison
    found = [contradiction(m, results[0].baseline, by) for m, by in by_model.items()]
    return [said for said in found if said is not None]
