"""DiscoPOP: a loss that a language model proposed, a blend of a logistic and an exponential one.

The blend moves from the exponential loss, where the margin is large, to the logistic one, where it
is small or negative. At the published temperature of 0.05 it is not monotone: between about -0.12
and 0.07 of beta times the margin it rises with the margin. Every run starts in there, at 0, and a
pair in there is pushed the wrong way. That is the loss as published; `note` says it at the start of
a run, and from a temperature of 0.2 on the loss falls everywhere.

Source: Lu et al. 2024, arXiv:2406.08414 (the log-ratio modulated loss), in the form of TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import Between

_TOO_FAR = "above 1 a pair far on the wrong side has a loss without bound"


def discopop_loss(margin: Tensor, *, beta: float, temperature: float) -> Tensor:
    """(1 - m) * -log sigmoid(x) + m * exp(-x); x is beta * margin, m sigmoid(x / temperature).

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.
        temperature: how abruptly one part passes into the other, in (0, 1].

    Returns:
        Shape [B], at least 0; (log 2 + 1) / 2 where policy and reference agree.
    """
    logit = beta * margin
    logistic = -logsigmoid(logit) * torch.sigmoid(-logit / temperature)
    # One exponential of the sum: of a very wrong pair exp(-x) alone is infinite, and m is 0.
    exponential = torch.exp(logsigmoid(logit / temperature) - logit)
    return logistic + exponential


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(AbstractPairObjective):
    """DiscoPOP over one chosen and one rejected view."""

    temperature: Annotated[float, Between(0, 1, _TOO_FAR, without=[0])] = 0.05
    """Of the passage between the two parts; 0.05 as published. From 0.2 on the loss
    falls everywhere."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(discopop_loss(margin, beta=self.beta, temperature=self.temperature))

    def note(self) -> str:
        """Where the loss rises with the margin, in beta times the margin."""
        rising = self.rising()
        if rising is None:
            return ""
        return (
            f"pairs whose beta times margin is between {rising[0]:.2g} and {rising[1]:.2g} are "
            f"pushed the wrong way, which a temperature of 0.2 and more does not do"
        )

    def rising(self) -> tuple[float, float] | None:
        """Ends of the part, in beta times the margin, where the loss rises with it; None where it
        falls everywhere."""
        logits = torch.linspace(-6, 6, 24001, dtype=torch.float64)
        values = discopop_loss(logits, beta=1.0, temperature=self.temperature)
        up = (values.diff() > 0).nonzero().flatten()
        return (logits[up[0]].item(), logits[up[-1] + 1].item()) if len(up) else None
