"""Scorers of what was just sampled: what they are asked, and what becomes of their responses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffalign import components
from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError
from diffalign.files import sha256_of
from diffalign.imaging.image_files import pixels_of, read_image
from diffalign.ranges import Ranged
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.repeats import Perturbation, copies_of


def component_name(scorer: object) -> str:
    """The last part of the kind of a scorer or a reward."""
    return components.kind_of(scorer).rpartition(".")[2]


def numbered(kinds: Sequence[str]) -> list[str]:
    """Names of their own for components of some kinds: the kind, numbered where it is shared."""
    found: list[str] = []
    for kind in kinds:
        names = [kind, *(f"{kind}_{i}" for i in range(2, len(kinds) + 1))]
        found.append(next(name for name in names if name not in found))
    return found


def ask(scorer: AbstractScorer, images: Tensor, prompts: Sequence[str], t: int) -> Tensor:
    """Score images that were all predicted at one timestep.

    Args:
        scorer: is told the timestep if it takes one, and otherwise left to believe that the images
            are finished.
        images: shape [n, 3, H, W], nominally in [-1, 1]; the scorer is moved to their device.
        prompts: n of them.
        t: the timestep; 0 for finished images.

    Returns:
        Shape [n], float32, on the CPU; NaN where an image or its score is not finite.

    Raises:
        DataError: the scorer refuses the images, or returns something else than n scores.
    """
    broken = ~images.isfinite().flatten(start_dim=1).all(dim=1).cpu()
    times = torch.full((len(images),), t) if scorer.takes_time else None
    try:
        with torch.no_grad():
            scores = scorer.to(images.device).score(images.nan_to_num(), prompts, times)
    except ValueError as error:
        raise DataError(
            f"the scorer {component_name(scorer)} refuses the round's images: {error}"
        ) from error
    if scores.shape != (len(images),):
        raise DataError(
            f"the scorer {component_name(scorer)} must give {len(images)} images as many scores, "
            f"and returned the shape {tuple(scores.shape)}"
        )
    scores = scores.float().cpu()
    return scores.masked_fill(broken | ~scores.isfinite(), torch.nan)


def refuse_scorers_of_noise(scorers: Sequence[AbstractScorer]) -> None:
    """Raise ValueError where a scorer of finished images takes a timestep."""
    for scorer in scorers:
        if scorer.takes_time:
            raise ValueError(
                f"scorers names {components.kind_of(scorer)}, which scores noisy images at a "
                f"timestep, and these are finished; spo takes such a scorer"
            )


@dataclass(frozen=True)
class ScoredImage:
    """One image of a round, as a line of `scores.jsonl`."""

    visit: int
    """Number of its prompt's visit in the round."""
    prompt: str
    image: int
    """Its number among the images of the visit."""
    file: str
    """Relative to the round's folder; it is absent where the image was not finite."""
    scores: Mapping[str, float | None]
    """By scorer; None where one gave no finite score. Empty where there is no image."""
    watched: Mapping[str, float | None] = field(default_factory=dict)
    """The same by scorers that nothing is trained on."""
    deviations: Mapping[str, float | None] = field(default_factory=dict)
    """Standard deviation of each score over copies of the image; empty where there is one copy."""

    def gap_deviation(self, other: ScoredImage) -> float:
        """Standard deviation of the mean gap between the scores of two images that have all."""
        known = [*self.deviations.values(), *other.deviations.values()]
        return math.hypot(*(each or 0.0 for each in known)) / max(len(self.scores), 1)

    def vector(self) -> list[float] | None:
        """All scores, in the order of the scorers; None unless each of them is there."""
        scores = [score for score in self.scores.values() if score is not None]
        return scores if scores and len(scores) == len(self.scores) else None


WATCHED = "watched/"
"""Prefix, in the figures of a round, of scorers that nothing is trained on."""


def means_of(name: str, scores: Sequence[float | None], prefix: str = "") -> dict[str, float]:
    """Mean and spread of a round's scores for the log; nothing where none is finite.

    Args:
        name: of the scorer.
        scores: of images that are there.
        prefix: of the figures' names.
    """
    known = [score for score in scores if score is not None]
    if not known:
        return {}
    named = f"{prefix}{name}"
    return {f"{named}_mean": statistics.fmean(known), f"{named}_std": statistics.pstdev(known)}


def in_words(figures: Mapping[str, float]) -> str:
    """The figures of `means_of`."""
    mean, spread = figures.values()
    return f"{mean:.4g} \N{PLUS-MINUS SIGN} {spread:.2g}"


@dataclass(frozen=True, kw_only=True)
class WatchedRollouts(Ranged):
    """The setting of rounds whose images further scorers look at."""

    watch: tuple[AbstractScorer, ...] = field(default=(), metadata=MAY_CHANGE)
    """Further scorers, which nothing is trained on: where the score that rounds are compared by
    rises and theirs falls, `training.health` says so (reward_hacked)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_scorers_of_noise(self.watch)
        for scorer in self.watch:  # what images of a round win against each other has one mean
            scorer.refuse_comparing("rollouts.watch")


def watched_figures(
    watched: Scorers, rows: Sequence[Mapping[str, float | None]]
) -> tuple[dict[str, float], list[str]]:
    """Figures of a round by scorers that are watched, and the same in words.

    Args:
        watched: the scorers of now; one may be new since a part of the round was scored.
        rows: `ScoredImage.watched` of the images.
    """
    figures: dict[str, float] = {}
    said = []
    for name in watched.names:
        found = means_of(name, [row.get(name) for row in rows], WATCHED)
        said += [f"watched: {name} {in_words(found)}"] if found else []
        figures |= found
    return figures, said


@dataclass(frozen=True)
class Measured:
    """What scorers say of one image."""

    scores: dict[str, float | None]
    """By scorer: mean over the copies; None where one of them has no finite score."""
    deviations: dict[str, float | None]
    """Standard deviations over the copies, of n - 1; empty where there is one copy."""


class Scorers:
    """The scorers of a config, by name: the last part of the kind, numbered where shared."""

    def __init__(
        self,
        scorers: Sequence[AbstractScorer],
        *,
        repeats: int = 1,
        perturbation: Perturbation | None = None,
    ) -> None:
        """Args:
        scorers: without any, every image that is there has no scores.
        repeats: copies of each image that are scored, itself included.
        perturbation: how they differ.
        """
        self._repeats, self._perturbation = repeats, perturbation or Perturbation()
        names = numbered([component_name(scorer) for scorer in scorers])
        self._scorers = dict(zip(names, scorers, strict=True))

    @property
    def names(self) -> list[str]:
        """In the order of the config."""
        return list(self._scorers)

    def fingerprints(self) -> list[str]:
        """Of the score."""
        return [scorer.fingerprint for scorer in self._scorers.values()]

    def warm_up(self, prompt: str, device: torch.device) -> None:
        """Have every scorer look at one grey image, so that all weights and tokens are there.

        Args:
            prompt: one of the run's own, since a scorer may refuse any other.
            device: where scorers with weights run.
        """
        for scorer in self._scorers.values():
            count = 2 if scorer.compares else 1  # one image alone would ask nothing
            ask(scorer, torch.zeros(count, 3, 64, 64, device=device), [prompt] * count, 0)

    def score_images(
        self, files: Sequence[Path], prompts: Sequence[str], device: torch.device
    ) -> list[dict[str, float | None]]:
        """Score what the files hold, 8 bits a channel, as whoever looks at them sees it.

        Args:
            files: images of one size; some may be absent.
            prompts: one a file.
            device: where scorers with weights run.

        Returns:
            For each file `ScoredImage.scores`.

        Raises:
            DataError: a scorer refuses the images, or returns something else than one score each.
        """
        return [each.scores for each in self.measure(files, prompts, device)]

    def measure(
        self, files: Sequence[Path], prompts: Sequence[str], device: torch.device
    ) -> list[Measured]:
        """Score copies of what the files hold; see `score_images`."""
        measured = [Measured({}, {}) for _ in files]
        there = [i for i, file in enumerate(files) if file.exists()]
        if there:
            images = [pixels_of(read_image(files[i])) for i in there]
            names = [(sha256_of(files[i]), prompts[i]) for i in there]
            copies = [
                copy.pixels
                for name, pixels in zip(names, images, strict=True)
                for copy in copies_of(name, pixels, self._repeats, self._perturbation)
            ]
            asked = [prompts[i] for i in there for _ in range(self._repeats)]
            found = self.score_tensors(torch.stack(copies).to(device), asked)
            for place, i in enumerate(there):
                own = found[place * self._repeats : (place + 1) * self._repeats]
                measured[i] = _over_copies(own)
        return measured

    def score_tensors(
        self, images: Tensor, prompts: Sequence[str]
    ) -> list[dict[str, float | None]]:
        """Score finished images, [n, 3, H, W] in [-1, 1], on their device."""
        scores: list[dict[str, float | None]] = [{} for _ in prompts]
        for name, scorer in self._scorers.items():
            for row, score in zip(scores, ask(scorer, images, prompts, 0).tolist(), strict=True):
                row[name] = score if math.isfinite(score) else None
        return scores

    def refuse_silence(self, images: Sequence[ScoredImage], folder: Path) -> None:
        """Raise DataError where no image of a round in `folder` has a score by some scorer."""
        sampled = [image for image in images if image.scores]
        if not sampled:
            raise DataError(
                f"{folder}: the policy sampled no image that holds finite values alone, so there "
                f"is "
                f"nothing to compare. Begin again with a lower optimizer.lr, or with precision "
                f"bf16 or float32"
            )
        for name in self._scorers:
            if all(image.scores[name] is None for image in sampled):
                raise DataError(
                    f"{folder}: the scorer {name} gave none of the round's {len(sampled)} images a "
                    f"finite score. Look at the images there; if they are as they should be, the "
                    f"scorer is at fault: try it on them with diffalign score"
                )


def _over_copies(copies: Sequence[Mapping[str, float | None]]) -> Measured:
    """Means and standard deviations over the copies of one image."""
    scores: dict[str, float | None] = {}
    deviations: dict[str, float | None] = {}
    for name in copies[0]:
        known = [score for copy in copies if (score := copy[name]) is not None]
        whole = len(known) == len(copies)
        scores[name] = statistics.fmean(known) if whole else None
        if len(copies) > 1:
            deviations[name] = statistics.stdev(known) if whole else None
    return Measured(scores, deviations)
