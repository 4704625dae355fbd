"""How probable a model finds one reverse step: the density of where a sampler arrived.

Sources: Black et al. 2023, arXiv:2305.13301 (DDPO); Yang et al. 2023, arXiv:2311.13231 (D3PO);
Liang et al. 2024, arXiv:2406.04314 (SPO).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.data.batches import StepBatch
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractVariancePreserving
from diffalign.models.diffusion.reverse import ReverseProcess, reverse_step
from diffalign.models.diffusion.sampling import Denoise
from diffalign.objectives.base import Measure
from diffalign.shapes import check_same_shape, expand_like

Reduction = Literal["mean", "sum"]


def transition_log_likelihood(
    outcome: Tensor, mean: Tensor, std: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Log-density of the next latent under the Gaussian of a reverse step, in nats.

    Args:
        outcome: where the step arrived, shape [B, ...]; data, no gradient flows into it.
        mean: of the step, same shape.
        std: of the step, shape [B], greater than 0.
        reduction: over the N dimensions of a latent. The mean is what DDPO, D3PO and SPO publish:
            their ratio of two models is the true one to the power 1/N, and their clip ranges
            presuppose it. The sum is the density itself.

    Returns:
        Shape [B], float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.
    """
    check_same_shape(outcome=outcome, mean=mean)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    std = expand_like(std.to(dtype), mean)
    deviation = (outcome.detach().to(dtype) - mean.to(dtype)) / std
    density = -0.5 * deviation.square() - std.log() - 0.5 * math.log(2.0 * math.pi)
    rows = density.flatten(start_dim=1)
    return rows.mean(dim=1) if reduction == "mean" else rows.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class PreparedSteps:
    """A `StepBatch` on the device, with its prompts encoded."""

    states: Tensor
    """Latents that steps leave from, float32 [U, channels, h, w]."""
    t: Tensor
    """Int64 [U], on the CPU."""
    t_next: Tensor
    """Int64 [U], on the CPU."""
    state_rows: Mapping[str, Tensor]
    """View -> int64 [B], the rows of `states` that its steps leave from."""
    outcomes: Mapping[str, Tensor]
    """View -> float32 [B, channels, h, w], where the steps arrived."""
    denoise: Denoise
    """The network in question, with the prompts of the U states, under guidance."""


@dataclass(frozen=True, kw_only=True)
class Transition(AbstractLikelihood[DiffusionModel, StepBatch, PreparedSteps]):
    """Log-density of the reverse steps that a batch carries."""

    batch_type: ClassVar[type] = StepBatch
    measures: ClassVar[Measure] = "step log-density"

    process: ReverseProcess = field(default_factory=ReverseProcess)
    """How the steps were sampled; policy and reference are measured the same way."""
    reduction: Reduction = "mean"
    """Over the dimensions of a latent: `mean` as published, or `sum`, which is as many times larger
    as a latent has numbers (16384 for SD 1.5 at 512 pixels)."""

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, AbstractDiffusion):
            raise ValueError("transition measures the steps of a diffusion model, such as sdxl")
        self.process.check(model.noising())

    def reverse_process(self) -> ReverseProcess:
        return self.process

    def noise(self, model: DiffusionModel, batch: StepBatch) -> Tensor:
        rows = next(iter(batch.state_rows.values()))
        return batch.t[rows] / model.noising.schedule_length

    def prepare(self, model: DiffusionModel, batch: StepBatch) -> PreparedSteps:
        """Encode the prompts, of which no gradient is kept, and move the batch."""
        factor = model.autoencoder.factor
        height, width = batch.states.shape[-2:]
        return PreparedSteps(
            states=send(batch.states, model.device),
            t=batch.t,
            t_next=batch.t_next,
            state_rows={view: send(rows, model.device) for view, rows in batch.state_rows.items()},
            outcomes={view: send(rows, model.device) for view, rows in batch.outcomes.items()},
            denoise=model.denoiser(
                batch.prompts,
                guidance=self.process.guidance,
                size=(height * factor, width * factor),
            ),
        )

    def evaluate(self, model: DiffusionModel, prepared: PreparedSteps) -> dict[str, Tensor]:
        noising = model.noising
        assert isinstance(noising, AbstractVariancePreserving), "check() was called"
        step = reverse_step(
            prepared.denoise,
            noising,
            prepared.states,
            prepared.t,
            prepared.t_next,
            eta=self.process.eta,
        )
        rows = prepared.state_rows
        return {
            view: transition_log_likelihood(
                outcome, step.mean[rows[view]], step.std[rows[view]], reduction=self.reduction
            )
            for view, outcome in prepared.outcomes.items()
        }

    def describe(self) -> str:
        """One line for the start of a run."""
        unit = {
            "mean": "mean over the numbers of a latent, which published clip ranges presuppose",
            "sum": "SUM over the numbers of a latent: N times the mean that published betas and "
            "clip ranges presuppose",
        }[self.reduction]
        process = self.process
        return (
            f"log-density of single reverse steps ({process.steps} steps, guidance "
            f"{process.guidance:g}, eta {process.eta:g}); {unit}"
        )
