"""Randomness as data: every random choice is a function of (run seed, sample id, sample number).

A sample is one visit of a sample. What is sampled for it does not depend on the batch it lands in,
on the rank that reads it, or on the device that trains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from diffalign.ranges import AtLeast, Ranged


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any identifying parts, the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def unit_interval(*parts: int | str) -> float:
    """A number in [0, 1), uniform over the parts; 53 random bits."""
    return (derive_seed(*parts) >> 10) / 2**53


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that its stream is the same whatever the device of the model."""
    return torch.Generator(device="cpu").manual_seed(seed)


def noise_from_seeds(seeds: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, one row a seed.

    Args:
        seeds: one per row.
        shape: of one row, for example (4, 64, 64).

    Returns:
        Shape [B, *shape], float32, on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=cpu_generator(seed)) for seed in seeds])


@dataclass(frozen=True, kw_only=True)
class TimestepSampling(Ranged):
    """Which training timesteps are visited. The default is uniform over all of them."""

    low: int = 0
    """First timestep, inclusive; 0 is the cleanest."""
    high: int | None = None
    """Last timestep, exclusive; null is the length of the model's own schedule."""
    strata: Annotated[int, AtLeast(1)] = 1
    """Consecutive samples of a sample cycle through this many equal parts of the range, from a
    sample-dependent start: the same distribution with less variance. 1 is plain uniform."""
    values: tuple[Annotated[int, AtLeast(0)], ...] = ()
    """If given, only these timesteps are used, uniformly (for example a distilled model's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 0 or (self.high is not None and self.high <= self.low):
            raise ValueError(
                f"timesteps need 0 <= low < high, got low {self.low} and high {self.high}"
            )
        if self.values and (self.low != 0 or self.high is not None):
            raise ValueError("values and low/high exclude each other: give one of them")

    def check(self, schedule_length: int) -> None:
        """Raise ValueError for timesteps that a schedule of this length does not have."""
        last = max(self.values, default=0 if self.high is None else self.high - 1)
        if max(last, self.low) >= schedule_length:
            raise ValueError(
                f"timesteps reach {max(last, self.low)}, but the model's schedule has "
                f"{schedule_length}: 0 to {schedule_length - 1}"
            )

    def sample(self, run_seed: int, sample_id: str, sample: int, *, schedule_length: int) -> float:
        """The time of one sample, in [low, high) and in units of training timesteps.

        Discrete schedules take its integer part, continuous ones divide by `schedule_length`.
        """
        stratum = sample + derive_seed(run_seed, sample_id, "stratum")
        position = unit_interval(run_seed, sample_id, sample, "timestep")
        fraction = (stratum % self.strata + position) / self.strata
        if self.values:
            return float(self.values[int(fraction * len(self.values))])
        high = schedule_length if self.high is None else self.high
        return self.low + fraction * (high - self.low)
