"""Groups of trajectories that share a start noise: sampled, kept in files, paired step by step.

A file holds n trajectories as rows of one tensor: row `j * n + i` is where trajectory i stands
after j of its S steps, so row i is its start noise and row `S * n + i` its final latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffalign.models.denoiser import DiffusionModel
from diffalign.models.reverse import ReverseProcess
from diffalign.rollouts.sampler import Trajectories, sample
from diffalign.rollouts.schedule import Visit
from diffalign.rollouts.store import LATENTS, StepPair, write_tensors
from diffalign.seeding import derive_seed

LOG_LIKELIHOODS = "log_likelihoods"
"""Name of the tensor of each step's log-density under the model that took it, float32 [S, n]."""

Times = Sequence[tuple[int, int]]
"""S pairs of timesteps: where each step leaves from and arrives."""


def sample_groups(
    model: DiffusionModel,
    process: ReverseProcess,
    visits: Sequence[Visit],
    *,
    images: int,
    size: tuple[int, int] | None = None,
) -> Trajectories:
    """Sample several trajectories of each visit; those of one visit start from the same noise.

    Trajectory `v * images + i` is number i of visit v.

    Args:
        model: the policy, or within `reference()` the reference.
        process: how steps are taken.
        visits: prompts with their seeds.
        images: trajectories of each visit.
        size: (height, width) in pixels; None is the network's own.
    """
    group = [(visit, number) for visit in visits for number in range(images)]
    return sample(
        model,
        process,
        [visit.prompt for visit, _ in group],
        start_seeds=[derive_seed(visit.seed, "start") for visit, _ in group],
        step_seeds=lambda step: [derive_seed(visit.seed, "step", n, step) for visit, n in group],
        size=size,
    )


def write_trajectories(path: Path, trajectories: Trajectories, **metadata: str) -> None:
    """Write a file of trajectories, whole or not at all."""
    tensors = {
        LATENTS: trajectories.latents.flatten(end_dim=1),
        LOG_LIKELIHOODS: trajectories.log_likelihoods,
    }
    write_tensors(path, tensors, **metadata)


@dataclass(frozen=True, kw_only=True)
class TrajectoryPair:
    """Two trajectories of a file, of which one is preferred."""

    pair_id: str
    prompt: str
    file: str
    """Of latents, relative to the folder that its readers know."""
    trajectories: int
    """How many the file holds."""
    chosen: int
    rejected: int

    def step(self, index: int, times: Times) -> StepPair:
        """The pair at one of its steps, to which the preference applies unchanged.

        Args:
            index: of the step, from 0.
            times: of all steps.
        """
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        before, after = index * self.trajectories, (index + 1) * self.trajectories
        t, t_next = times[index]
        return StepPair(
            sample_id=f"{self.pair_id}/step-{index}",
            prompt=self.prompt,
            file=self.file,
            t=t,
            t_next=t_next,
            states={view: before + number for view, number in sides.items()},
            outcomes={view: after + number for view, number in sides.items()},
        )


def all_finite(trajectories: Trajectories) -> list[bool]:
    """Of each trajectory, whether it never left the numbers."""
    finite = torch.isfinite(trajectories.latents).flatten(start_dim=2).all(dim=2)
    return [bool(each) for each in finite.all(dim=0)]
