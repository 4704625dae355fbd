"""DPO that holds each side to the reference at a beta of its own.

Under one beta the rejected side moves fastest: its log-ratio has further to fall than that of the
chosen side can rise. A smaller beta there holds it back; the chosen side may then do more of the
work.

DPO compares two log-ratios, so that what both of them gain alike changes nothing. With two betas it
does: an equal gain of both sides moves the logit by the difference of the betas.

Sources: Yan et al. 2024, arXiv:2406.07327 (3D-properties), for responses; with equal betas it is
Rafailov et al. 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta, pair_metrics


def two_beta_loss(
    chosen: Tensor, rejected: Tensor, *, beta_chosen: float, beta_rejected: float
) -> Tensor:
    """Negative log-probability that the chosen side is preferred, each side on its own scale.

    Args:
        chosen, rejected: log-ratios of policy to reference, shape [B].
        beta_chosen: of the preferred side, in one over the units of the log-ratios; above 0.
        beta_rejected: of the other side, likewise.

    Returns:
        Shape [B]; log 2 where policy and reference agree.
    """
    return -logsigmoid(beta_chosen * chosen - beta_rejected * rejected)


@dataclass(frozen=True, kw_only=True)
class TwoBetas(AbstractPairObjective):
    """DPO over one chosen and one rejected view, with two betas.

    A beta belongs to the part that a view plays: where a label is taken the other way round, the
    preferred view has `beta`.
    """

    beta: Beta
    """Of the chosen side, in the units of `dpo.py`."""
    beta_rejected: Beta
    """Of the rejected side; below `beta` to let it fall more slowly, and equal to it for DPO."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        ratios = chosen.log_ratio, rejected.log_ratio
        loss = two_beta_loss(*ratios, beta_chosen=self.beta, beta_rejected=self.beta_rejected)
        rewards = self.beta * ratios[0], self.beta_rejected * ratios[1]
        return LossOutput(loss, pair_metrics(*rewards, chosen.preference))
