"""Timesteps of training samples: how they are distributed, and one for each visit of a sample.

A timestep is a function of the run's seed, the sample and the number of its visit, never of a
global random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

from diffalign.ranges import AtLeast, MoreThan, Ranged
from diffalign.seeding import derive_seed, unit_interval


def shifted(share: float, factor: float) -> float:
    """Move a time on the straight path towards the noise, or for a factor below 1 away from it.

    The ratio of noise to image, share / (1 - share), is multiplied by the factor: an image of more
    pixels needs more noise to be hidden as well (arXiv:2403.03206, eq. 23).

    Args:
        share: of the noise, in [0, 1].
        factor: above 0; 1 moves nothing, 3 is SD3's own.
    """
    return factor * share / (1.0 + (factor - 1.0) * share)


@dataclass(frozen=True, kw_only=True)
class ResolutionShift(Ranged):
    """A shift that grows with the image, as FLUX and SD3.5 Medium have it: its logarithm, mu, is a
    line through two sizes. The defaults are those of diffusers' `calculate_shift`."""

    base: float = 0.5
    """Mu of an image of `base_tokens`."""
    max: float = 1.15
    """Mu of an image of `max_tokens`; larger ones are beyond it."""
    base_tokens: Annotated[int, AtLeast(1)] = 256
    """Of the smaller image: 256 pixels a side."""
    max_tokens: int = 4096
    """Of the larger one: 1024 pixels a side."""
    pixels_per_token: Annotated[int, AtLeast(1)] = 16
    """Along either side: a patch of 2 latents of 8 pixels each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens <= self.base_tokens:
            raise ValueError(
                f"a shift by resolution needs base_tokens < max_tokens, got {self.base_tokens} "
                f"and {self.max_tokens}"
            )

    def mu(self, tokens: float) -> float:
        """Logarithm of the shift of an image of so many tokens."""
        slope = (self.max - self.base) / (self.max_tokens - self.base_tokens)
        return self.base + slope * (tokens - self.base_tokens)

    def factor(self, size: tuple[int, int]) -> float:
        """The shift of an image of (height, width) pixels."""
        return math.exp(self.mu(size[0] * size[1] / self.pixels_per_token**2))


_LAST_SHARE = math.nextafter(1.0, 0.0)
"""Times lie below the length of the schedule."""


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
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Over the range: `logit_normal` visits its middle more often than its ends, as SD3 was trained
    (arXiv:2403.03206, eq. 19)."""
    mean: float = 0.0
    """Of the logit of a logit-normal time; above 0 prefers noise."""
    std: Annotated[float, MoreThan(0)] = 1.0
    """Of that logit."""
    shift: Annotated[float, MoreThan(0)] = 1.0
    """Times of a straight path are moved towards the noise by this factor, after they are sampled:
    see `shifted`. 1 moves nothing, SD3's own is 3."""
    shift_by_resolution: ResolutionShift | None = None
    """In place of that, a factor that depends on the size of the image; `{}` takes the usual
    line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 0 or (self.high is not None and self.high <= self.low):
            raise ValueError(
                f"timesteps need 0 <= low < high, got low {self.low} and high {self.high}"
            )
        if self.values and (self.low != 0 or self.high is not None):
            raise ValueError("values and low/high exclude each other: give one of them")
        if self.values and (self.distribution != "uniform" or self.moves):
            raise ValueError("values are used as they are: leave distribution and shift out")
        if self.shift != 1 and self.shift_by_resolution is not None:
            raise ValueError("shift and shift_by_resolution exclude each other: give one of them")

    @property
    def moves(self) -> bool:
        """Whether times are shifted, which only those of a straight path can be."""
        return self.shift != 1 or self.shift_by_resolution is not None

    def check(self, schedule_length: int) -> None:
        """Raise ValueError for timesteps that a schedule of this length does not have."""
        last = max(self.values, default=0 if self.high is None else self.high - 1)
        if max(last, self.low) >= schedule_length:
            raise ValueError(
                f"timesteps reach {max(last, self.low)}, but the model's schedule has "
                f"{schedule_length}: 0 to {schedule_length - 1}"
            )

    def sample(
        self,
        run_seed: int,
        sample_id: str,
        sample: int,
        *,
        schedule_length: int,
        visits: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> float:
        """The time of one sample, in units of training timesteps; in [low, high) unless shifted.

        Discrete schedules take its integer part, continuous ones divide by `schedule_length`.

        Args:
            run_seed: of the run.
            sample_id: of the sample.
            sample: number of its earlier visits.
            schedule_length: of the model.
            visits: how many visits of the sample differ, those from 0 on; each of them then has a
                time from another of so many parts, equally probable ones, in an order of the
                sample's own. None where every visit is new.
            size: (height, width) of its images in pixels, for a shift by resolution.
        """
        if visits is None:
            parts = self.strata
            part = (sample + derive_seed(run_seed, sample_id, "stratum")) % parts
        else:
            parts, part = visits, _order(visits, run_seed, sample_id)[sample]
        position = unit_interval(run_seed, sample_id, sample, "timestep")
        fraction = min((part + position) / parts, _LAST_SHARE)
        if self.values:
            return float(self.values[int(fraction * len(self.values))])
        high = schedule_length if self.high is None else self.high
        time = self.low + self.quantile(fraction) * (high - self.low)
        if not self.moves:
            return time
        share = shifted(time / schedule_length, self._factor(size))
        return min(share, _LAST_SHARE) * schedule_length

    def quantile(self, fraction: float) -> float:
        """Below which share of the range so many of the times lie; both in [0, 1)."""
        if self.distribution == "uniform":
            return fraction
        logit = NormalDist(self.mean, self.std).inv_cdf(max(fraction, 2.0**-54))
        return min(1.0 / (1.0 + math.exp(-logit)), _LAST_SHARE)

    def _factor(self, size: tuple[int, int] | None) -> float:
        if self.shift_by_resolution is None:
            return self.shift
        if size is None:
            raise ValueError("a shift by resolution needs the size of the images")
        return self.shift_by_resolution.factor(size)


def _order(count: int, run_seed: int, sample_id: str) -> list[int]:
    """The numbers below `count` in the order of a sample."""
    return sorted(range(count), key=lambda n: derive_seed(run_seed, sample_id, "part", n))
