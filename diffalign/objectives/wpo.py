"""Weighted preference optimisation: pairs count by how likely the policy would be to write them.

Responses of a data set are mostly of other models. Where both responses of a pair are typical of
the policy, the pair counts as much as one that it had written itself; where one is not, it counts
less. The weight of a pair is the product over both responses of exp(mean over tokens of
log p(token) - log sum p^2), and carries no gradient: sum p^2 is the probability that the policy's
own samples have on average.

It multiplies any loss of pairs of responses, which is the setting `objective`. The authors hold it
at 1 from above, TRL does not; `clamp` says which.

Source: Zhou et al. 2024, arXiv:2406.11827, with the weights of wzhouad/WPO or, unclamped, of TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    Known,
    LossOutput,
    Measure,
    Measured,
    Part,
    Views,
)
from diffalign.objectives.pair import CHOSEN_AND_REJECTED


def typicality_weight(chosen: Tensor, rejected: Tensor, *, clamp: bool = True) -> Tensor:
    """How much a pair counts.

    Args:
        chosen, rejected: `Likelihoods.typicality` of the two responses, shape [B].
        clamp: hold it at 1 from above.

    Returns:
        Shape [B], above 0, without gradient.
    """
    weight = torch.exp(chosen.detach() + rejected.detach())
    return weight.clamp(max=1) if clamp else weight


@dataclass(frozen=True, kw_only=True)
class WPO(AbstractObjective):
    """Another loss over chosen and rejected responses, times the weight of each pair."""

    objective: AbstractObjective
    """The loss, such as dpo; it needs what it needs by itself."""
    clamp: bool = True
    """Hold weights at 1 from above, as the authors do. A pair of two very typical responses would
    otherwise count more than one that the policy had sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.objective.views >= CHOSEN_AND_REJECTED:
            raise ValueError(
                f"objective compares {', '.join(sorted(self.objective.views))}, and a weight is "
                f"one of a chosen and a rejected response: take a loss of both, such as dpo"
            )
        if not self.reads:
            raise ValueError(
                f"objective has a meaning for a {' or a '.join(sorted(self.objective.reads))}, "
                f"and a weight is made of log-probabilities of tokens: take another loss"
            )

    @property
    def views(self) -> frozenset[str]:
        """Those of its loss."""
        return self.objective.views

    @property
    def needs_reference(self) -> bool:
        """Whether its loss does."""
        return self.objective.needs_reference

    @property
    def must_know(self) -> Known:
        """What its loss must."""
        return self.objective.must_know

    @property
    def takes_strength(self) -> frozenset[Part]:
        """What its loss does."""
        return self.objective.takes_strength

    @property
    def needs_strength(self) -> frozenset[Part]:
        """What its loss does."""
        return self.objective.needs_strength

    @property
    def needs_divergence(self) -> bool:
        """Whether its loss does."""
        return self.objective.needs_divergence

    @property
    def needs_measured(self) -> frozenset[Measured]:
        """Typicality, and what its loss needs."""
        return self.objective.needs_measured | {"typicality"}

    @property
    def holds_fixed(self) -> frozenset[str]:
        """What its loss does."""
        return self.objective.holds_fixed

    @property
    def reads(self) -> frozenset[Measure]:
        """Tokens, if its loss has a meaning for them."""
        return self.objective.reads & TOKENS

    def __call__(self, views: Views) -> LossOutput:
        typical = [views[side].typicality for side in ("chosen", "rejected")]
        assert typical[0] is not None and typical[1] is not None, "the run was checked"
        output = self.objective(views)
        weight = typicality_weight(typical[0], typical[1], clamp=self.clamp)
        return LossOutput(weight * output.loss, {**output.metrics, "pair_weight": weight})

    def note(self) -> str:
        """What its loss has to say."""
        kind = type(self.objective).__module__.rpartition(".")[2]
        said = f"{kind}, each pair by how typical it is of the policy"
        return "; ".join(filter(None, [said, self.objective.note()]))

    def state_dict(self) -> dict[str, Tensor]:
        """What its loss remembers."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give it back."""
        self.objective.load_state_dict(state)
