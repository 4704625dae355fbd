"""Figures of a micro-batch that say how a model is doing, besides those of its loss.

All of them stay on the device, as sums that are read where a logging interval ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.objectives.base import Likelihoods, Measure

SATURATED = 4.0
"""Magnitude of a logit from which a pair hardly pulls: the gradient of the logistic loss is
sigmoid(-4), 1.8 % of its largest."""
BANDS = 4
"""Equal parts of the noise schedule, from the cleanest to the noisiest."""


@dataclass(frozen=True)
class Subset:
    """A figure of some rows of a micro-batch; which ones, the host need not know."""

    values: Tensor
    """Shape [n]."""
    counted: Tensor
    """1 for each row that counts and 0 for the others, shape [n]."""


Figure = Tensor | Subset
"""A figure of a micro-batch: of each of its rows, of some of them, or a scalar."""


def model_figures(views: Mapping[str, Likelihoods], measure: Measure) -> dict[str, Tensor]:
    """What the policy makes of each view, next to the reference where there is one.

    Args:
        views: of a micro-batch.
        measure: of the likelihood.

    Returns:
        By name, each [n]: `drift/VIEW`, the log-ratio; of a denoiser `error/VIEW`, the mean squared
        error; of responses `log_prob/VIEW`, log-probability per token, `tokens/VIEW`, and with a
        reference `fell/VIEW`, the share that is less probable than under it.
    """
    figures: dict[str, Tensor] = {}
    for name, view in views.items():
        if view.reference is not None:
            figures[f"drift/{name}"] = view.log_ratio
        if measure == "denoising error":
            figures[f"error/{name}"] = -2 * view.policy
        if measure == "token log-probability":
            figures[f"log_prob/{name}"] = view.average
            if view.reference is not None:
                figures[f"fell/{name}"] = (view.log_ratio < 0).float()
            if view.length is not None:
                figures[f"tokens/{name}"] = view.length
    return {name: values.detach() for name, values in figures.items()}


def margin_figures(metrics: Mapping[str, Tensor], noise: Tensor | None) -> dict[str, Figure]:
    """What becomes of the margins that an objective reports, of each of its terms.

    Args:
        metrics: of the objective; those called `margin`, or `TERM/margin`, are read, and
            `preference` next to them.
        noise: share of the schedule at which each sample was seen, [n] in [0, 1], on the CPU; None
            where nothing is noised.

    Returns:
        `saturated`, the share of pairs whose logit is beyond `SATURATED` on either side; `far_off`,
        the share of those that are beyond it on the wrong side; and `margin/noise_0-25` to
        `margin/noise_75-100`, the mean margin by parts of the schedule. With `TERM/` in front where
        the margin has it.
    """
    figures: dict[str, Figure] = {}
    bands: Tensor | None = None
    for name, margin in metrics.items():
        prefix, _, last = name.rpartition("/")
        if last != "margin":
            continue
        term = f"{prefix}/" if prefix else ""
        figures[f"{term}saturated"] = (margin.abs() > SATURATED).float()
        preference = metrics.get(f"{term}preference")
        agreed = margin if preference is None else margin * (preference - 0.5).sign()
        figures[f"{term}far_off"] = (agreed < -SATURATED).float()
        if noise is None or margin.shape != noise.shape:
            continue
        if bands is None:
            bands = send(bands_of(noise), margin.device)
        for number, counted in enumerate(bands):
            low, high = (100 * edge // BANDS for edge in (number, number + 1))
            figures[f"{term}margin/noise_{low}-{high}"] = Subset(margin, counted)
    return figures


def length_figures(views: Mapping[str, Likelihoods]) -> dict[str, Figure]:
    """Whether a preference for the chosen response is one for its length.

    Args:
        views: of a micro-batch.

    Returns:
        `accuracy/chosen_shorter` and `accuracy/chosen_longer`: how often the implicit reward
        prefers the chosen side, of the pairs in which that side has fewer, or more, tokens; and
        `chosen_longer`, the share of the latter. Nothing where there are no tokens or no pairs.
    """
    chosen, rejected = views.get("chosen"), views.get("rejected")
    if chosen is None or rejected is None or chosen.rows is not None:
        return {}
    if chosen.length is None or rejected.length is None:
        return {}
    margin = reward_of(chosen) - reward_of(rejected)
    agreed = margin if chosen.preference is None else margin * (chosen.preference - 0.5).sign()
    right = (agreed.sign() + 1) / 2
    shorter, longer = chosen.length < rejected.length, chosen.length > rejected.length
    return {
        "accuracy/chosen_shorter": Subset(right, shorter.float()),
        "accuracy/chosen_longer": Subset(right, longer.float()),
        "chosen_longer": longer.float(),
    }


def displacement_figures(views: Mapping[str, Likelihoods]) -> dict[str, Figure]:
    """Whether pairs of responses are told apart at the cost of the chosen one.

    Args:
        views: of a micro-batch.

    Returns:
        `displaced`: 1 for each pair whose margin over the reference is positive although the chosen
        response became less probable. Nothing without pairs, tokens or a reference.

    Source: Razin et al. 2024, arXiv:2410.08847 (likelihood displacement).
    """
    chosen, rejected = views.get("chosen"), views.get("rejected")
    if chosen is None or rejected is None or chosen.rows is not None or rejected.rows is not None:
        return {}
    if chosen.length is None or chosen.reference is None or rejected.reference is None:
        return {}
    ratio = chosen.log_ratio.detach()
    return {"displaced": ((ratio < 0) & (ratio > rejected.log_ratio.detach())).float()}


def reward_of(view: Likelihoods) -> Tensor:
    """The implicit reward, [n], without gradient: the log-ratio, or without a reference the
    log-likelihood, of a token where there are tokens."""
    return (view.average if view.reference is None else view.log_ratio).detach()


def bands_of(noise: Tensor) -> Tensor:
    """Which part of the schedule each sample was seen in, float32 [BANDS, n], one 1 a column."""
    numbers = (noise * BANDS).long().clamp(0, BANDS - 1)
    return (numbers == torch.arange(BANDS)[:, None]).float()
