"""Results of step-wise resampling: comparisons, the pairs of steps that they label, and the
latents of those steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.rollouts.pairing import Temperature, preference_of
from diffalign.rollouts.resampling import Segment
from diffalign.rollouts.round_order import Visit
from diffalign.rollouts.store import StepPair

_THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the candidates of a prompt did at the end of a segment: a line of a round's scores."""

    visit: int
    """Number of the prompt in its round."""
    prompt: str
    step: int
    """Index of the sampler's step that branched."""
    t: int
    """Timestep at which the candidates were scored; 0 where they were finished."""
    scores: Sequence[float | None]
    """Of the candidates; None where not finite."""
    best: int
    worst: int
    difference: float | None
    """See `resampling.Selection`; None where a score is not finite."""
    valid: bool
    """Whether the segment's steps are trained on."""
    continued: int
    """The candidate from which the sampler went on."""
    watched: Sequence[Mapping[str, float | None]] = ()
    """Of finished candidates, scores by scorers that nothing is trained on."""


class PairBuilder:
    """Of visits that are sampled side by side: all comparisons, the pairs of steps that valid ones
    label, and the latents that these need, each once."""

    def __init__(
        self,
        visits: Sequence[Visit],
        *,
        round_number: int,
        first_visit: int,
        file: str,
        temperature: Temperature = None,
    ) -> None:
        """Args:
        visits: in the order of the segments' rows.
        round_number, first_visit: number of the round, and in it of the first visit.
        file: of the latents, in the round's folder.
        temperature: of preferences; see `Temperature`.
        """
        self.file = file
        self.pairs: list[StepPair] = []
        self.comparisons: list[Comparison] = []
        self._visits = visits
        self._round_number = round_number
        self._temperature = temperature
        self._first_visit = first_visit
        self._origins = [0] * len(visits)  # the candidates that the next segment leaves from
        self._latents: list[Tensor] = []
        self._rows: dict[tuple[int, int, int], int] = {}  # visit, steps taken, candidate -> row

    def latents(self) -> Tensor:
        """The rows of the file, float32 [rows, channels, h, w]; at least one pair needs them."""
        return torch.stack(self._latents)

    def add(
        self, segment: Segment, watched: Sequence[Sequence[Mapping[str, float | None]]] = ()
    ) -> None:
        """Enter what the next segment came to.

        Args:
            segment: of all visits.
            watched: `Comparison.watched` of each visit; empty where nobody looks on.
        """
        for i in range(len(self._visits)):
            found = self._comparison(segment, i)
            self.comparisons.append(replace(found, watched=watched[i]) if watched else found)
            if segment.selection.valid[i]:
                self.pairs.extend(self._label(segment, i))
        self._origins = segment.continued.tolist()

    def _comparison(self, segment: Segment, i: int) -> Comparison:
        selection = segment.selection
        return Comparison(
            visit=self._first_visit + i,
            prompt=self._visits[i].prompt,
            step=segment.first,
            t=segment.t,
            scores=[_finite(score) for score in segment.scores[i].tolist()],
            best=int(selection.best[i]),
            worst=int(selection.worst[i]),
            difference=_finite(float(selection.difference[i])),
            valid=bool(selection.valid[i]),
            continued=int(segment.continued[i]),
        )

    def _label(self, segment: Segment, i: int) -> list[StepPair]:
        """The steps of the best and the worst candidate, whose first ones leave from one state."""
        sides = {
            "chosen": int(segment.selection.best[i]),
            "rejected": int(segment.selection.worst[i]),
        }
        origin = self._row(i, segment.first, self._origins[i], segment.origin[i])
        states = dict.fromkeys(sides, origin)
        scores = {view: float(segment.scores[i, side]) for view, side in sides.items()}
        gap = scores["chosen"] - scores["rejected"]
        pairs = []
        for taken, (t, t_next) in enumerate(segment.times):
            index = segment.first + taken
            outcomes = {
                view: self._row(i, index + 1, side, segment.paths[taken, i, side])
                for view, side in sides.items()
            }
            pairs.append(
                StepPair(
                    sample_id=f"round-{self._round_number}/{self._first_visit + i}/step-{index}",
                    prompt=self._visits[i].prompt,
                    file=self.file,
                    t=t,
                    t_next=t_next,
                    states=states,
                    outcomes=outcomes,
                    preference=preference_of(gap, self._temperature),
                )
            )
            states = outcomes
        return pairs

    def _row(self, i: int, taken: int, candidate: int, latent: Tensor) -> int:
        """The latent's place in the file; it is given one on first mention."""
        place = (i, taken, candidate)
        if place not in self._rows:
            self._rows[place] = len(self._latents)
            self._latents.append(latent)
        return self._rows[place]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarise(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Figures of a round with at least one finite score.

    `score_mean` and `score_std` are of finished candidates, `candidate_score_mean` and `_std` of
    all of them, which is what the authors watch; `valid` is the share of comparisons that are
    trained on, `valid_early` and so on of those in each third of the way from noise to image.
    `images` counts the prompts with finished candidates, which are too alike to count as several.
    """
    figures = {
        "valid": statistics.fmean(row.valid for row in comparisons),
        "scored": float(sum(len(row.scores) for row in comparisons)),
    }
    finished = [row for row in comparisons if row.t == 0]
    figures["images"] = float(len(finished))
    for name, rows in (("score", finished), ("candidate_score", comparisons)):
        scores = [score for row in rows for score in row.scores if score is not None]
        if scores:
            figures[f"{name}_mean"] = statistics.fmean(scores)
            figures[f"{name}_std"] = statistics.pstdev(scores)
    branches = sorted({row.step for row in comparisons})
    for third, name in enumerate(_THIRDS):
        steps = {step for i, step in enumerate(branches) if 3 * i // len(branches) == third}
        valid = [row.valid for row in comparisons if row.step in steps]
        if valid:
            figures[f"valid_{name}"] = statistics.fmean(valid)
    return figures


def in_words(summary: dict[str, float]) -> str:
    """The figures of `summarise` as a clause."""
    thirds = ", ".join(
        f"{summary[f'valid_{name}']:.0%} {name}" for name in _THIRDS if f"valid_{name}" in summary
    )
    counting = f"{summary['valid']:.0%} of the comparisons count ({thirds})"
    if "score_mean" not in summary:
        return f"no finished candidate has a finite score; {counting}"
    mean, spread = summary["score_mean"], summary["score_std"]
    return f"score {mean:.4g} \N{PLUS-MINUS SIGN} {spread:.2g}; {counting}"
