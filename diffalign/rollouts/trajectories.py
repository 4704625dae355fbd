"""Groups of trajectories that share a start noise: sampled, and kept in files.

A file holds n trajectories as rows of one tensor: row `j * n + i` is where trajectory i is
after j of its S steps, so row i is its start noise and row `S * n + i` its final latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.rollouts.round_order import Visit
from diffalign.rollouts.sampler import Trajectories, sample
from diffalign.rollouts.store import LATENTS, write_tensors
from diffalign.seeding import derive_seed

LOG_LIKELIHOODS = "log_likelihoods"
"""Name of the tensor of each step's log-density under the model that took it, float32 [S, n]."""


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


def finite(trajectories: Trajectories) -> list[bool]:
    """Of each trajectory, whether it holds numbers alone."""
    latents = trajectories.latents.transpose(0, 1).flatten(start_dim=1)
    return [bool(row) for row in torch.isfinite(latents).all(dim=1)]


def write_trajectories(path: Path, trajectories: Trajectories, **metadata: str) -> None:
    """Write a file of trajectories, whole or not at all."""
    tensors = {
        LATENTS: trajectories.latents.flatten(end_dim=1),
        LOG_LIKELIHOODS: trajectories.log_likelihoods,
    }
    write_tensors(path, tensors, **metadata)
