"""REINFORCE on sampled responses as wholes, with a baseline of the others of the same prompt.

The ratio is that of the whole response, the product over its tokens: of responses of hundreds of
tokens it is nearly always beyond the clip range once the policy has moved, so that most of the
gradient comes from the first step after sampling. The baseline, and any divergence from a
reference, are in the advantages that come with the responses.

Source: Ahmadian et al. 2024, arXiv:2402.14740, in the form of TRL's `RLOOTrainer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    LossOutput,
    Measure,
    Measured,
    Part,
    Views,
)
from diffalign.objectives.grpo import bounded, clipped_loss
from diffalign.ranges import Between, MoreThan


@dataclass(frozen=True, kw_only=True)
class RLOO(AbstractObjective):
    """A policy gradient over the view `sampled`, each response as one action."""

    views: ClassVar[frozenset[str]] = frozenset({"sampled"})
    needs_reference: ClassVar[bool] = False
    reads: ClassVar[frozenset[Measure]] = TOKENS
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_measured: ClassVar[frozenset[Measured]] = frozenset({"tokens"})

    clip: Annotated[float, Between(0, 1, without=[0])] = 0.2
    """How far a response's ratio may fall below 1 before it stops to count."""
    clip_high: Annotated[float, MoreThan(0)] | None = None
    """How far it may rise above 1; null takes `clip`."""

    def __call__(self, views: Views) -> LossOutput:
        view = views["sampled"]
        tokens, advantage = view.tokens, view.advantage
        assert tokens is not None and advantage is not None, "the run was checked"
        ratio = bounded((tokens.log_ratio * tokens.weights).sum(dim=1)).exp()
        high = self.clip if self.clip_high is None else self.clip_high
        loss = clipped_loss(ratio, advantage, low=self.clip, high=high)
        idle = ((ratio < 1 - self.clip) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
        return LossOutput(
            loss,
            {
                "ratio": ratio.detach(),
                "advantage": advantage,
                "clipped": idle.to(ratio.dtype),
            },
        )

    def note(self) -> str:
        """Why the loss of a healthy run is near 0."""
        return (
            "straight after sampling the loss is minus the mean advantage, whatever is learnt; "
            "watch the rewards of the rounds, ratio and clipped"
        )
