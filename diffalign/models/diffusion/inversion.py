"""The way from an image to the noise that a model would make it from: DDIM, walked backwards.

A preference of images says most where the model would have met them. Random noise puts an image
somewhere near the model's own trajectories; inverted noise puts it on one.

Sources: Lu et al. 2025, arXiv:2503.18454 (InPO: ten steps, some new noise in each); Lu et al. 2025,
arXiv:2506.02698 (SmPO: each step is taken twice, the second time with the mean of two predictions).

Departures from their code, each of which is a mistake there:

- Times are those of the grid on which the walk arrives. There they are any, the walk stops below
  them, and what it holds is taken for the level of the time: at half of the way the noise is up to
  44 % too large, and two times between the same two steps have the same latent.
- Each row has its own time. There the first one's counts for the whole batch.
- The noise of the last step is that up to the end of the schedule, where there it is looked up
  behind it, which ends the run at one time in ten.
- The reference walks, without dropout, so that the noise of an image stays the same while the
  policy changes. There it is the network in training, in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.models.diffusion.noising import AbstractVariancePreserving
from diffalign.ranges import Between, Ranged
from diffalign.shapes import expand_like

SCHEDULE_LENGTH = 1000
"""Training timesteps of the models whose grids are known here: all of Stable Diffusion."""
_FIRST = 1
"""Timestep at which the grid begins, `steps_offset` of Stable Diffusion's schedulers."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents [m, ...], their times int64 [m], which of the n rows they are int64 [m]) -> what
the model predicts of `noising.target`, [m, ...]."""


@dataclass(frozen=True, kw_only=True)
class Inversion(Ranged):
    """How noise is found for an image."""

    steps: Annotated[int, Between(1, 500)] = 10
    """From the image to all noise; InPO has 10, SmPO 5 on SD 1.5 and 10 on SDXL. A pair is seen at
    one of so many times, and on average half of the steps are evaluations of the network, on top of
    training."""
    refined: bool = False
    """Take each step twice, the second time with the mean of the predictions before and after it
    (SmPO), at twice the cost."""
    eta: Annotated[float, Between(0, 1)] = 0.0
    """Share of new noise that each step adds, of the standard deviation that a reverse step has
    there; InPO has 0.1. At 0 an image has the same noise whenever it is seen at a time."""
    by: Literal["reference", "policy"] = "reference"
    """Which of the two walks. Noise that the policy finds moves as it learns."""

    @property
    def times(self) -> tuple[int, ...]:
        """Where the steps arrive, ascending."""
        stride = SCHEDULE_LENGTH // self.steps
        return tuple(_FIRST + number * stride for number in range(self.steps))

    def check(self, noising: object) -> None:
        """Raise ValueError unless a model with this noising can be walked."""
        if not isinstance(noising, AbstractVariancePreserving):
            raise ValueError(
                "inversion walks the steps of a beta schedule (SD 1.5, SDXL), and this model "
                "follows a straight path: leave inversion out"
            )
        if noising.schedule_length != SCHEDULE_LENGTH:
            raise ValueError(
                f"inversion has its times in {SCHEDULE_LENGTH} training timesteps, and this model "
                f"has {noising.schedule_length}: leave inversion out"
            )


def inverted(
    clean: Tensor,
    t: Tensor,
    predict: Predict,
    noising: AbstractVariancePreserving,
    *,
    times: Sequence[int],
    refined: bool = False,
    eta: float = 0.0,
    added: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents that the model would denoise into the clean ones, each at its own time.

    Args:
        clean: scaled latents, shape [n, ...].
        t: int64 [n], on the CPU; each row walks up to the last of `times` that does not exceed its
            own.
        predict: without gradient.
        noising: of the model.
        times: ascending; all but the last rows stop before the last one.
        refined, eta: see `Inversion`.
        added: number of a step -> standard normal noise, shape of `clean`; asked for where eta is
            above 0.

    Returns:
        Shape [n, ...].
    """
    latents = clean.clone()
    kept = noising.alphas_cumprod
    stride = times[1] - times[0] if len(times) > 1 else len(kept)
    for number, time in enumerate(times):
        rows = (t >= time).nonzero().flatten()
        if len(rows) == 0:
            break
        levels = (kept[times[number - 1] if number else 0], kept[time])
        at = torch.full((len(rows),), time)
        index = send(rows, latents.device)
        start = latents[index]
        noise = noising.separate(start, predict(start, at, index), at)[1]
        moved = _step(start, noise, *levels)
        if refined:
            again = noising.separate(moved, predict(moved, at, index), at)[1]
            moved = _step(start, (noise + again) / 2, *levels)
        if eta > 0:
            assert added is not None, "noise is asked for"
            ahead = torch.tensor([min(time + stride, len(kept) - 1)])
            std = noising.reverse_std(ahead, torch.tensor([time]), eta=eta)
            spread = expand_like(send(std.to(moved.dtype), moved.device), moved)
            moved = moved + spread * send(added(number), moved.device)[index]
        latents[index] = moved.to(latents.dtype)
    return latents


def _step(latents: Tensor, noise: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
    """From one level of noise to a higher one; levels are squared shares of the image."""
    image = (latents - (1 - level).sqrt().item() * noise) / level.sqrt().item()
    return next_level.sqrt().item() * image + (1 - next_level).sqrt().item() * noise


def noise_within(
    latents: Tensor, clean: Tensor, t: Tensor, noising: AbstractVariancePreserving
) -> Tensor:
    """The noise that mixes clean latents into these at time t: what `corrupt` takes.

    Args:
        latents, clean: shape [n, ...].
        t: int64 [n].
        noising: of the model.
    """
    kept = noising.alphas_cumprod[t.cpu().long()]
    image, noise = (
        expand_like(send(share.sqrt().to(latents.dtype), latents.device), latents)
        for share in (kept, 1 - kept)
    )
    return (latents - image * clean) / noise
