"""What a preference model says of images seen through one denoising step.

A score takes the place of a log-likelihood: an objective such as bradley_terry compares the scores
of two views. Labels are the data set's, or those of a scorer of the clean images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from diffalign import components
from diffalign.data.batches import ImageBatch
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.diffusion.reverse import through_one_step
from diffalign.models.preference.step_aware import StepAwareModel, StepAwarePreference
from diffalign.objectives.base import Measure
from diffalign.ranges import Between
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.step_aware import tower_pixels
from diffalign.timesteps import TimestepSampling


def preference_from_scores(chosen: Tensor, rejected: Tensor, *, tie_below: float) -> Tensor:
    """A scorer's label of each pair: 1, 0, or one half where it hardly tells the sides apart.

    Args:
        chosen, rejected: scores of the two sides in nats, shape [B].
        tie_below: largest difference of the two preference probabilities that is a tie.

    Returns:
        Probability that the chosen side is preferred, float32 [B]; NaN where a score is, so that
        the step that meets it is not taken.
    """
    difference = torch.tanh((chosen.float() - rejected.float()) / 2)  # sigmoid(m) - sigmoid(-m)
    preference = (difference > 0).float().masked_fill(difference.abs() <= tie_below, 0.5)
    return preference.masked_fill(difference.isnan(), torch.nan)


def side_weights(strength: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """How much the win of either side counts, as a loss of scores reads it.

    Args:
        strength: of B pairs, see `ImageBatch`; without a preference the chosen side is the better
            one for certain, and without a weight all pairs count alike.
        count: B.

    Returns:
        View -> importance times the probability that this side is the better one, [B].
    """
    importance = strength.get("weight", torch.ones(count))
    preference = strength.get("preference", torch.ones(count))
    return {"chosen": importance * preference, "rejected": importance * (1 - preference)}


@dataclass(frozen=True, kw_only=True)
class HalfwayViews:
    """V views of B samples as V * B rows, as the vision tower takes them."""

    views: tuple[str, ...]
    pixels: Tensor
    """Shape [V * B, 3, size, size], float32."""
    t: Tensor
    """Training timesteps, shape [V * B]."""
    tokens: Tensor
    """Int64 [B, tokens]; the views of a sample share its prompt."""
    text_rows: Tensor
    """Int64 [V * B], the row of `tokens` of each image."""
    weights: Mapping[str, Tensor]
    """View -> importance of the pair times the probability that this side is preferred, [B]."""


@dataclass(frozen=True, kw_only=True)
class Scores(AbstractLikelihood[StepAwareModel, ImageBatch, HalfwayViews]):
    """Scores of a step-aware preference model at the time and noise that the batch carries."""

    batch_type: ClassVar[type] = ImageBatch
    measures: ClassVar[Measure] = "score"
    needs_captions: ClassVar[bool] = True

    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    """Which times the loader samples."""
    relabel: AbstractScorer | None = None
    """Labels the clean images in place of the data set, such as pickscore (the authors' recipe
    for SDXL); null keeps the labels."""
    tie_below: Annotated[
        float, Between(0, 1, "it is a difference of probabilities", without=[1])
    ] = 0.1
    """With `relabel`: preferences whose probabilities differ by no more are ties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relabel is not None and self.relabel.takes_time:
            raise ValueError("relabel scores clean images: take a scorer without timesteps")
        if self.relabel is not None:
            self.relabel.refuse_comparing("likelihood.relabel")

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, StepAwarePreference):
            raise ValueError("scores are those of a preference model: set model.kind to step_aware")
        self.timesteps.check(model.noising().schedule_length)

    @property
    def replaced_strength(self) -> frozenset[str]:
        """The preference, where a scorer labels anew."""
        return frozenset({"preference"} if self.relabel is not None else ())

    def timestep_sampling(self) -> TimestepSampling:
        return self.timesteps

    def noise(self, model: StepAwareModel, batch: ImageBatch) -> Tensor:
        return batch.timesteps / model.base.noising.schedule_length

    @torch.no_grad()
    def prepare(self, model: StepAwareModel, batch: ImageBatch) -> HalfwayViews:
        """See all views through one step of the base; they share time, noise and prompt.

        The prompt is the caption, dropped or not: an image cannot be scored without.
        """
        views = tuple(batch.images)
        count = len(views)
        images = torch.cat([batch.images[view] for view in views])
        t = batch.timesteps.repeat(count)
        halfway = through_one_step(
            model.base,
            images,
            batch.captions * count,
            t,
            noise_seeds=batch.noise_seeds * count,
            encoding_seeds=[seed for view in views for seed in batch.encoding_seeds[view]],
            guidance=model.guidance,
        )
        return HalfwayViews(
            views=views,
            pixels=tower_pixels(halfway, model.image_size),
            t=send(model.base.noising.network_time(t), model.device),
            tokens=model.tokens(batch.captions),
            text_rows=send(torch.arange(len(batch)).repeat(count), model.device),
            weights=self._weights(model, batch),
        )

    def evaluate(self, model: StepAwareModel, prepared: HalfwayViews) -> dict[str, Tensor]:
        rows = model.scores(prepared.pixels, prepared.t, prepared.tokens, prepared.text_rows)
        return dict(zip(prepared.views, rows.chunk(len(prepared.views)), strict=True))

    def row_metadata(self, prepared: HalfwayViews) -> dict[str, dict[str, Tensor]]:
        """How much each side's win counts, as `weight`."""
        return {view: {"weight": weight} for view, weight in prepared.weights.items()}

    def _weights(self, model: StepAwareModel, batch: ImageBatch) -> dict[str, Tensor]:
        strength = dict(batch.strength)
        if self.relabel is not None:
            strength["preference"] = self._scored(self.relabel, model, batch)
        weights = side_weights(strength, len(batch))
        return {view: send(weight, model.device) for view, weight in weights.items()}

    def _scored(
        self, score_images: AbstractScorer, model: StepAwareModel, batch: ImageBatch
    ) -> Tensor:
        score_images.to(model.device)
        sides: list[Any] = [
            score_images.score(send(batch.images[view], model.device), batch.captions).cpu()
            for view in ("chosen", "rejected")
        ]
        return preference_from_scores(*sides, tie_below=self.tie_below)

    def describe(self) -> str:
        """One line for the start of a run."""
        if self.relabel is None:
            return "score of images seen through one denoising step"
        return (
            f"score of images seen through one denoising step, labelled anew by "
            f"{components.kind_of(self.relabel)}, ties up to a difference of {self.tie_below:g}"
        )
