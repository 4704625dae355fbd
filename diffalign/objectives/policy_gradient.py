"""The policy gradient: responses count by their advantage, whichever sign it has.

The gradient is that of minus the advantage times the mean log-probability of a response's tokens,
and so GRPO's where the policy that sampled is the one that learns.

Source: Williams 1992 (REINFORCE); Shao et al. 2024 (GRPO), arXiv:2402.03300.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import TOKENS, AbstractObjective, LossOutput, Measure, Part, Views


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(AbstractObjective):
    """Minus advantage times log-probability per token, of responses that the policy sampled."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen"})
    needs_reference: ClassVar[bool] = False
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    reads: ClassVar[frozenset[Measure]] = TOKENS

    def __call__(self, views: Views) -> LossOutput:
        chosen = views["chosen"]
        assert chosen.advantage is not None, "needs_strength names it"
        loss = -chosen.advantage * chosen.average
        return LossOutput(loss, {"log_likelihood": chosen.average.detach()})
