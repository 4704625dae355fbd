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
from diffalign.errors import DataError
from diffalign.imaging.image_files import pixels_of, read_image
from diffalign.scorers.base import AbstractScorer


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


class Scorers:
    """The scorers of a config, by name: the last part of the kind, numbered where shared."""

    def __init__(self, scorers: Sequence[AbstractScorer]) -> None:
        """Args:
        scorers: without any, every image that is there has no scores.
        """
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
            ask(scorer, torch.zeros(1, 3, 64, 64, device=device), [prompt], 0)

    def score_images(
        self, files: Sequence[Path], prompts: Sequence[str], device: torch.device
    ) -> list[dict[str, float | None]]:
        """Scorer what the files hold, 8 bits a channel, as whoever looks at them sees it.

        Args:
            files: images of one size; some may be absent.
            prompts: one a file.
            device: where scorers with weights run.

        Returns:
            For each file `ScoredImage.scores`.

        Raises:
            DataError: a scorer refuses the images, or returns something else than one score each.
        """
        there = [i for i, file in enumerate(files) if file.exists()]
        scores: list[dict[str, float | None]] = [{} for _ in files]
        if there:
            images = torch.stack([pixels_of(read_image(files[i])) for i in there]).to(device)
            asked = [prompts[i] for i in there]
            for name, scorer in self._scorers.items():
                verdicts = ask(scorer, images, asked, 0).tolist()
                for i, score in zip(there, verdicts, strict=True):
                    scores[i][name] = score if math.isfinite(score) else None
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
