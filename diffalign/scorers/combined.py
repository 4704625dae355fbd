"""A weighted sum of named scorers, each as it is or in standard deviations from its mean.

A sum is one number where several are asked for, and lets a large gain in one make up for a loss in
another. Where that is not meant, name the scorers next to each other in `rollouts.scorers`: there
an image wins if it is at least as good under each.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffalign import components
from diffalign.config import MAY_CHANGE
from diffalign.data.score_columns import read_score_column
from diffalign.errors import DataError
from diffalign.files import read_json_lines
from diffalign.scorers.base import AbstractScorer

_LEAST = 2
"""Scores of a file from which there is a standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One scorer of a sum."""

    scorer: AbstractScorer
    """Who scores."""
    weight: float = 1.0
    """Of its scores in the sum; below 0 for one that is to be low."""
    mean: float | None = None
    """What is taken off its scores before the weight; null takes nothing off."""
    deviation: float | None = None
    """By what they are divided then; null leaves them in their own units."""
    moments: Path | None = field(default=None, metadata=MAY_CHANGE)
    """A file of scores by this scorer, as `score` writes them (`scores/NAME.jsonl` or
    `NAME.parquet`), whose mean and standard deviation are taken for both. Their values are part of
    what the sum is, so that another file makes other scores."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"weight must be a number other than 0, got {self.weight:g}")
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("mean and deviation make z-scores together: give both, or none")
        if self.moments is not None and self.mean is not None:
            raise ValueError(
                "moments is a file that mean and deviation are measured on: give the file, or the "
                "two"
            )
        if self.deviation is not None and not 0 < self.deviation < math.inf:
            raise ValueError(f"deviation must be greater than 0, got {self.deviation:g}")

    def standardise(self) -> tuple[float, float]:
        """What is taken off the scores, and by what they are divided.

        Raises:
            DataError: the file of scores cannot be read, is of another scorer, or holds scores
                that do not differ.
        """
        if self.moments is not None:
            return moments_of(self.moments, self.scorer)
        if self.mean is None or self.deviation is None:
            return 0.0, 1.0
        return self.mean, self.deviation


def moments_of(path: Path, scorer: AbstractScorer) -> tuple[float, float]:
    """Mean and standard deviation (of n) of a file of scores, each image and prompt once.

    Args:
        path: `scores/NAME.jsonl` or `NAME.parquet`.
        scorer: who must have given them.

    Raises:
        DataError: another one did, or there are too few, or they do not differ.
    """
    if path.suffix == ".parquet":
        column = read_score_column(path)
        known = [row.score for row in column.rows.values() if row.score is not None]
        by = {column.scorer.fingerprint}
    else:
        rows = read_json_lines(path)
        try:
            found = {(row["image"], row["prompt"]): float(row["score"]) for row in rows}
            by = {str(row["fingerprint"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: is no file of scores as `diffalign score` writes it"
            ) from error
        known = list(found.values())
    kind = components.kind_of(scorer)
    others = {each for each in by if not f"{each}, ".startswith(f"{scorer.fingerprint}, ")}
    if others:  # a file of copies names their number behind the fingerprint
        raise DataError(
            f"{path} holds scores by {', '.join(sorted(others))}, and {kind} here is "
            f"{scorer.fingerprint}: mean and deviation must be of the very scorer. Score "
            f"the images again with it"
        )
    deviation = statistics.pstdev(known) if len(known) >= _LEAST else 0.0
    if not 0 < deviation < math.inf:
        raise DataError(
            f"{path} holds {len(known)} scores by {kind} that do not differ, so there is no "
            f"standard deviation to divide by"
        )
    return statistics.fmean(known), deviation


@dataclass(frozen=True, kw_only=True)
class Combined(AbstractScorer):
    """Sum over the parts of weight * (score - mean) / deviation."""

    parts: Mapping[str, Part]
    """The scorers by names of your own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) < 1:
            raise ValueError("parts is empty: name at least one scorer")
        for name, part in self.parts.items():
            part.scorer.refuse_comparing(f"parts.{name}: a sum")
            if part.scorer.takes_time:
                raise ValueError(
                    f"parts.{name} is {components.kind_of(part.scorer)}, which scores noisy images "
                    f"at a timestep, and a sum is of finished ones"
                )

    @property
    def fingerprint(self) -> str:
        terms = [
            [name, part.scorer.fingerprint, part.weight, *self._moments[name]]
            for name, part in sorted(self.parts.items())
        ]
        return f"combined-{hashlib.blake2b(repr(terms).encode(), digest_size=8).hexdigest()}"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Score finished images against their prompts.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1].
            prompts: n of them.
            t: must be None.

        Returns:
            Shape [n], float32, on the device of `images`; NaN where a part has no finite score.

        Raises:
            ValueError: `t` is given, or a part refuses the images.
            DataError: the moments of a part cannot be had.
        """
        if t is not None:
            raise ValueError("Combined scores finished images and takes no timesteps: leave out t")
        total = torch.zeros(len(images), dtype=torch.float64)
        for name, part in self.parts.items():
            mean, deviation = self._moments[name]
            scores = part.scorer.score(images, prompts).double().cpu()
            total += part.weight * (scores - mean) / deviation
        return total.float().masked_fill(~total.isfinite(), torch.nan).to(images.device)

    def to(self, device: torch.device | str) -> Combined:
        for part in self.parts.values():
            part.scorer.to(device)
        return self

    @cached_property
    def _moments(self) -> dict[str, tuple[float, float]]:
        return {name: part.standardise() for name, part in self.parts.items()}
