"""Direct preference optimisation: a logistic classifier whose logit is the policy's own margin.

One file serves denoisers and language models; only the scale of the log-likelihoods differs, and
beta absorbs it. With `denoising_log_likelihood` (minus half a mean squared error), beta is the
`beta_dpo` of the Salesforce DiffusionDPO code: its `-0.5 * beta * (model_diff - ref_diff)` equals
`beta * margin` here. The diffusers SD1.5 script leaves the half out: its 2500 is 5000 here.

Sources: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; for diffusion Wallace et al. 2023,
arXiv:2311.12908, eq. 14 with T and the constant timestep weight folded into beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta


def dpo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """Negative log-probability that the chosen side is preferred.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B], in the
            units of the likelihood that produced it (nats for token sums, half a mean squared
            error for denoising).
        beta: pull towards the reference, in one over those units; greater than 0.

    Returns:
        Loss of each pair, shape [B]; log 2 where policy and reference agree.
    """
    return -logsigmoid(beta * margin)


@dataclass(frozen=True, kw_only=True)
class DPO(AbstractPairObjective):
    """DPO over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference. No default: published values run from 0.1 for sums over tokens
    to 5000 for means over latent pixels, where it equals the Salesforce `beta_dpo`."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(dpo_loss(margin, beta=self.beta))
