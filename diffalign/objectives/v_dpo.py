"""Vision-guided DPO: reward what the image adds to a response.

The policy's score of a response next to its images is mixed with its score without them (the
condition `zero`), which carries no gradient: gamma * seeing + (1 - gamma) * blind. A penalty on the
divergence of the two would have the same optimum; gamma = 1 is DPO.

Source: Xie et al. 2024, arXiv:2411.02712, as in llava_dpo/train/llava_trainer.py of YuxiXie/V-DPO.
Their script sets gamma to 0, at which nothing has a gradient; it is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    Likelihoods,
    LossOutput,
    Measure,
    Part,
    Views,
)
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import EITHER_ORDER, Beta, expected_loss, pair_metrics
from diffalign.ranges import MoreThan
from diffalign.views import View


def mixed_score(seeing: Tensor, blind: Tensor, *, gamma: float) -> Tensor:
    """Log-likelihood with and without images, mixed.

    Args:
        seeing: policy's log-likelihood of responses next to their images, shape [B].
        blind: log-likelihood without them, same shape; its gradient is not used.
        gamma: share of the first.

    Returns:
        Shape [B].
    """
    return gamma * seeing + (1 - gamma) * blind.detach()


@dataclass(frozen=True, kw_only=True)
class VDPO(AbstractObjective):
    """DPO on mixed scores of one chosen and one rejected response."""

    needs_reference: ClassVar[bool] = True
    reads: ClassVar[frozenset[Measure]] = TOKENS
    takes_strength: ClassVar[frozenset[Part]] = EITHER_ORDER

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`; 0.1 in the authors' code."""
    gamma: Annotated[float, MoreThan(0, "without images there is no gradient: nothing is learnt")]
    """Share of the score next to images; useful between 0 and 1. No default: the released 0
    teaches nothing."""
    condition: str = "zero"
    """Condition under which images show nothing; the views `chosen@zero` and `rejected@zero`."""
    blind: Literal["policy", "reference"] = "policy"
    """Whose score without images is mixed in: that of the policy, as it now is, or that of the
    reference. Both are in the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for view in self.views:
            View.parse(view)

    @property
    def views(self) -> frozenset[str]:
        """Both responses, each with its images and without."""
        sides = frozenset({"chosen", "rejected"})
        return sides | {f"{side}@{self.condition}" for side in sides}

    @property
    def holds_fixed(self) -> frozenset[str]:
        """Both responses without their images, where the policy says how likely they are."""
        blind = self.views - {"chosen", "rejected"}
        return blind if self.blind == "policy" else frozenset()

    def __call__(self, views: Views) -> LossOutput:
        return expected_loss(self.own(views), self._loss)

    def _loss(self, views: Views) -> LossOutput:
        chosen, rejected = (
            self._log_ratio(views[side], views[f"{side}@{self.condition}"])
            for side in ("chosen", "rejected")
        )
        loss = dpo_loss(chosen - rejected, beta=self.beta)
        rewards = self.beta * chosen, self.beta * rejected
        return LossOutput(loss, pair_metrics(*rewards, views["chosen"].preference))

    def _log_ratio(self, seeing: Likelihoods, blind: Likelihoods) -> Tensor:
        assert seeing.reference is not None and blind.reference is not None, "it needs them"
        without = blind.policy if self.blind == "policy" else blind.reference
        return mixed_score(seeing.policy, without, gamma=self.gamma) - seeing.reference
