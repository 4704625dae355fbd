"""Token-level DPO: the margin less how much further the policy has left the reference on one side.

Divergences are sums over tokens of KL(reference || policy). The first version carries gradient
through both; the second only through the rejected side's, and weighs the difference.

Source: Zeng et al. 2024, arXiv:2404.11999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import TOKENS, Likelihoods, LossOutput, Measure
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import AbstractPairObjective, Beta


def divergence_of(view: Likelihoods) -> Tensor:
    """Sum over the tokens of KL(reference || policy), shape [n].

    Raises:
        ValueError: the likelihood did not measure it.
    """
    if view.divergence is None:
        raise ValueError(
            "this objective compares divergences of tokens, and the likelihood measured none: use "
            "likelihood tokens with divergence: true"
        )
    return view.divergence


@dataclass(frozen=True, kw_only=True)
class TDPO(AbstractPairObjective):
    """TDPO over one chosen and one rejected view of token likelihoods."""

    reads: ClassVar[frozenset[Measure]] = TOKENS
    compares_rewards: ClassVar[bool] = True
    needs_divergence: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`; 0.1 in the paper."""
    version: Literal[1, 2] = 2
    """1 subtracts the difference of divergences with gradient through both, as the authors'
    configuration; 2 weighs it by alpha, and holds the chosen side's."""
    alpha: float | None = None
    """Weight of the difference in version 2, which takes 0.5 where nothing is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version == 1 and self.alpha is not None:
            raise ValueError(f"alpha is {self.alpha}, and only version 2 weighs its divergences")

    @property
    def holds_fixed(self) -> frozenset[str]:
        """The chosen side's divergence, in version 2."""
        return frozenset({"chosen.divergence"} if self.version == 2 else ())

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        drift_chosen, drift_rejected = divergence_of(chosen), divergence_of(rejected)
        if self.version == 1:
            excess = drift_rejected - drift_chosen
        else:
            weight = 0.5 if self.alpha is None else self.alpha
            excess = weight * (drift_rejected - drift_chosen.detach())
        loss = dpo_loss(chosen.log_ratio - rejected.log_ratio - excess, beta=self.beta)
        drifts = {
            "divergence_chosen": drift_chosen.detach(),
            "divergence_rejected": drift_rejected.detach(),
        }
        return LossOutput(loss, drifts)
