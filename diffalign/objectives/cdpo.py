"""Conservative DPO: a preference that is right only with a known probability.

The target of the classifier is 1 - label_smoothing instead of 1, so a pair whose margin says more
than the labels are worth is pulled back. `robust` is the form whose mean over mislabelled pairs is
DPO's on clean ones.

Source: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import Between

_SHARE = "it is the share of pairs that are the wrong way round"


def cdpo_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Cross-entropy of a predicted preference from one that holds with 1 - label_smoothing.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.
        label_smoothing: probability that a pair is the wrong way round, in [0, 0.5).

    Returns:
        Shape [B]; lowest where sigmoid(beta * margin) == 1 - label_smoothing.
    """
    logit = beta * margin
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


@dataclass(frozen=True, kw_only=True)
class ConservativeDPO(AbstractPairObjective):
    """DPO with smoothed labels over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    label_smoothing: Annotated[float, Between(0, 0.5, _SHARE, without=[0.5])] = 0.1
    """Probability that a pair is the wrong way round; 0 is DPO."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(cdpo_loss(margin, beta=self.beta, label_smoothing=self.label_smoothing))
