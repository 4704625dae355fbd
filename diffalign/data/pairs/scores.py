"""The section `data.scores`: files of scores next to a data set, and what they decide about a pair.

A name of a score is that of a file; `NAME.deviation` is its standard deviation; `ensemble` is the
mean over several scorers, each in units of its own spread. The gap of a name is the number of the
chosen side less that of the rejected one.
"""

from __future__ import annotations

import bisect
import math
import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from diffalign.config import MAY_CHANGE
from diffalign.data.rows import Row
from diffalign.data.skipping import LeftOut
from diffalign.data.strength.base import SCORES, malformed
from diffalign.errors import did_you_mean
from diffalign.ranges import AtLeast, MoreThan, Range, Ranged

ENSEMBLE = "ensemble"
"""Name of the mean over scorers."""
DEVIATION = ".deviation"
"""What the name of a standard deviation ends with."""


@dataclass(frozen=True, kw_only=True)
class ScoreFile(Ranged):
    """One file of scores."""

    file: Path = field(metadata=MAY_CHANGE)
    """Parquet that `diffalign score data.path=DATA` wrote."""
    scorer: str
    """Whose scores they must be: the scorer's kind, such as `pickscore`, or its fingerprint."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Ranged):
    """Which pairs are turned round or left out for their gap.

    Wang et al. 2024, arXiv:2401.06080 (Secrets of RLHF II) call the mean gap of several scorers the
    strength of a preference: far below 0 the label is wrong, near 0 it is of little worth.
    """

    by: str
    """The score whose gap is looked at, such as `ensemble`."""
    flip_below: Annotated[float, Range(high=0)] | None = None
    """A gap below which the other image is taken as the preferred one."""
    drop_below: float | None = None
    """A gap below which the pair is left out, unless it was turned round. With the reference's own
    scores (`diffalign precompute --scores`) that are pairs which it ranks far the other way round:
    DPO hardly turns their order, and lowers both sides (arXiv:2405.19534)."""
    spread_above: Annotated[float, MoreThan(0)] | None = None
    """Standard deviation over the scorers of the ensemble of their gaps, above which the pair is
    left out: they do not agree by how much it is preferred."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = (self.flip_below, self.drop_below, self.spread_above)
        if all(limit is None for limit in limits):
            raise ValueError("filter has no limit: give flip_below, drop_below or spread_above")
        if self.spread_above is not None and self.by != ENSEMBLE:
            raise ValueError(
                f"spread_above is how far the scorers of the ensemble are apart, and filter is by "
                f"{self.by}: set by to {ENSEMBLE}, or leave spread_above out"
            )
        if None not in (self.flip_below, self.drop_below) and self.drop_below <= self.flip_below:  # type: ignore[operator]
            raise ValueError(
                f"drop_below is {self.drop_below:g}, and a gap below {self.flip_below:g} is turned "
                f"round (flip_below): set drop_below above it, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class OrderConfig(Ranged):
    """Pairs in bands of their gap, one band after the other.

    Sources: Croitoru et al. 2024, arXiv:2405.13637 (Curriculum-DPO); Pattnaik et al. 2024,
    arXiv:2403.07230 (Curry-DPO). Both go from large gaps to small ones.
    """

    by: str
    """The score whose gap orders the pairs."""
    bands: Annotated[int, AtLeast(2)] = 3
    """How many bands of equally many pairs there are."""
    passes: Annotated[int, AtLeast(1)] = 1
    """How often the pairs of a band are seen before the next band comes; after the last one the
    first comes again."""
    first: Literal["large_gap", "small_gap"] = "large_gap"
    """Which pairs come first: those that are easy to tell apart, or those that are not."""
    only: Annotated[int, AtLeast(1)] | None = None
    """Train on this band alone, from 1: one run a band, each from the model of the one before, has
    the reference renewed with every band, as Curry-DPO has it. Null takes all bands in turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only is not None and self.only > self.bands:
            raise ValueError(f"only is {self.only}, and there are {self.bands} bands")


@dataclass(frozen=True, kw_only=True)
class TagConfig(Ranged):
    """Prompts that say how good the image is, so that sampling can ask for it.

    Sources: Zhang et al. 2024, arXiv:2410.08067 (reward-augmented data: pairs under goals); the
    `score_9` of the Pony models is such a tag.
    """

    by: str
    """The score that is told."""
    caption: str = "score_{q}, {caption}"
    """The prompt of a side: {caption} is that of the data, {q} says where the score of its image
    lies among all of the file, from 1 for the lowest."""
    quantiles: Annotated[int, AtLeast(2)] | None = None
    """The value of {q} for the highest scores; null is 9, or as many as there are words."""
    words: tuple[str, ...] = ()
    """What {q} says in place of the numbers from 1 on, from the lowest scores to the highest, such
    as `[worst quality, normal quality, best quality]`: words that the text encoder knows."""
    tells: Literal["own", "goal"] = "own"
    """What the prompts of a pair tell. `own`: each side the score of its image. `goal`: both sides
    the score of one of them, by turns, and the side that has it is the chosen one, so that a loss
    of pairs learns to give what is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words and (self.quantiles is not None or len(set(self.words)) < 2):
            raise ValueError(
                f"words are two or more different ones, and say how many quantiles there are: got "
                f"{', '.join(self.words)}, and quantiles {self.quantiles}"
            )
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.caption) if name]
        except ValueError as error:
            raise ValueError(f"caption {self.caption!r} is no template: {error}") from None
        if set(fields) != {"caption", "q"} or fields.count("caption") != 1:
            raise ValueError(
                f"caption is {self.caption!r}, and must hold {{q}}, and {{caption}} once, such as "
                f"'score_{{q}}, {{caption}}'"
            )

    @property
    def highest(self) -> int:
        """The quantile of the highest scores; that of the lowest is 1."""
        return len(self.words) or self.quantiles or 9

    def prompt(self, q: int, caption: str) -> str:
        """The prompt that tells or asks for a score, by its quantile."""
        told = self.words[q - 1] if self.words else q
        return self.caption.format(q=told, caption=caption)


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(Ranged):
    """Files of scores, joined to the images of a data set by their content and prompt.

    `data.strength` reads them as `scores.NAME`: as probabilities, margins and targets.
    """

    columns: dict[str, ScoreFile] = field(default_factory=dict)
    """A name of your own -> the file."""
    ensemble: tuple[str, ...] = ()
    """Names of columns whose mean is called `ensemble`, each score less the mean of its file and
    over its standard deviation; `ensemble.deviation` is their standard deviation of an image."""
    filter: FilterConfig | None = None
    """Pairs that are turned round or left out; null takes them as they are labelled."""
    order: OrderConfig | None = None
    """Bands in which pairs are seen; null takes all in random order."""
    tag: TagConfig | None = None
    """Scores in the prompts; null leaves prompts as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.columns:
            if not name.isidentifier() or name == ENSEMBLE:
                raise ValueError(
                    f"columns.{name}: a name is of letters, digits and underscores, and not "
                    f"{ENSEMBLE}"
                )
        if len(set(self.ensemble)) != len(self.ensemble) or len(self.ensemble) == 1:
            raise ValueError(f"ensemble takes two or more different scores, got {self.ensemble}")
        for name in self.ensemble:
            self.check_name(name, "ensemble", self.columns)
        for key in ("filter", "order", "tag"):
            if (part := getattr(self, key)) is not None:
                self.check_name(part.by, f"{key}.by")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all scores and their deviations."""
        own = [*self.columns, *([ENSEMBLE] if self.ensemble else [])]
        return tuple(f"{name}{end}" for name in own for end in ("", DEVIATION))

    def check_name(
        self, name: str, key: str, known: Sequence[str] | Mapping[str, object] = ()
    ) -> None:
        """Raise ValueError for a score that there is not."""
        allowed = [*known] or [n for n in self.names if not n.endswith(DEVIATION)]
        if name not in (known or self.names):
            raise ValueError(
                f"{key} reads the score {name}, and there "
                f"{'are ' + ', '.join(allowed) if allowed else 'is none'}: name its file under "
                f"scores.columns{' (ensemble takes several)' * (name == ENSEMBLE)}."
                f"{did_you_mean(name, allowed)}"
            )


def virtual(name: str) -> tuple[str, str]:
    """What the numbers of both sides of a pair are called among the values of its row."""
    return f"{SCORES}{name} of the first", f"{SCORES}{name} of the second"


def quantile(score: float, sorted_scores: Sequence[float], *, of: int) -> int:
    """Where a score lies among others, from 1 to `of`.

    It is the share of the scores other than itself that lie below it, so that the lowest of all is
    1 and the highest `of`, however many there are of either.

    Args:
        score: one of them.
        sorted_scores: rising; not all equal.
        of: how many values there are.
    """
    below = bisect.bisect_left(sorted_scores, score)
    above = len(sorted_scores) - bisect.bisect_right(sorted_scores, score)
    return 1 + min(of - 1, of * below // (below + above))


@dataclass(frozen=True, kw_only=True)
class ScoreRules:
    """What the scores of a row decide, once they are among its values."""

    config: ScoresConfig
    told: Sequence[float] = ()
    """All scores of the file that tags tell, rising."""

    def chosen(self, row: Row, labelled: int) -> int | LeftOut:
        """Which image is preferred, 0 or 1, or why the pair is left out.

        Args:
            row: a pair.
            labelled: which image the data set says is preferred.

        Raises:
            UnusableRowError: an image has no score.
        """
        rule = self.config.filter
        if rule is None:
            return labelled
        gap = self.gap(row, rule.by, labelled)
        if rule.spread_above is not None:
            gaps = [self.gap(row, scaled(name), labelled) for name in self.config.ensemble]
            if statistics.pstdev(gaps) > rule.spread_above:
                return LeftOut.SCORERS_DISAGREE
        if rule.flip_below is not None and gap < rule.flip_below:
            return 1 - labelled
        if rule.drop_below is not None and gap < rule.drop_below:
            return LeftOut.SMALL_GAP
        return labelled

    def gap(self, row: Row, name: str, chosen: int) -> float:
        """The score of the chosen image less that of the other.

        Raises:
            UnusableRowError: one has none.
        """
        numbers = [self.score(row, name, side) for side in (chosen, 1 - chosen)]
        return numbers[0] - numbers[1]

    def score(self, row: Row, name: str, side: int) -> float:
        """The score of one image.

        Raises:
            UnusableRowError: it has none.
        """
        found = row.values[virtual(name)[side]]
        if found is None or math.isnan(found):
            raise malformed(f"an image has no score {name}, and data.scores reads it")
        return float(found)

    def prompt(self, row: Row, side: int, caption: str) -> str | None:
        """The prompt of one image; None where it is that of the pair.

        Raises:
            UnusableRowError: it has no score.
        """
        tag = self.config.tag
        if tag is None or not caption:
            return None
        score = self.score(row, tag.by, side)
        return tag.prompt(quantile(score, self.told, of=tag.highest), caption)


def scaled(name: str) -> str:
    """The name of a score in units of its spread."""
    return f"{name}, scaled"


def names_read(config: ScoresConfig, strength: Sequence[str]) -> list[str]:
    """The scores that a row needs to have among its values.

    Args:
        config: the section.
        strength: names that `data.strength` reads, without their prefix.
    """
    parts = (config.filter, config.order, config.tag)
    names = [*strength, *(part.by for part in parts if part is not None)]
    if config.filter is not None and config.filter.spread_above is not None:
        names += map(scaled, config.ensemble)
    return list(dict.fromkeys(names))
