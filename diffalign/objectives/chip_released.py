"""CHiP as its code has it: one sigmoid of response, image and token margins together.

The paper adds up separate terms instead: that is a `weighted_sum` of `dpo` and `tdpo`. Weights of
changed segments are weight maps of views in both.

Source: Fu et al. 2025, arXiv:2501.16629, as `chip_loss` in llava/train/llava_trainer.py of
LVUGAI/CHiP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.objectives.base import TOKENS, AbstractObjective, LossOutput, Measure, Views
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import Beta, pair_metrics
from diffalign.objectives.tdpo import divergence_of
from diffalign.ranges import AtLeast
from diffalign.views import View


@dataclass(frozen=True, kw_only=True)
class ReleasedCHiP(AbstractObjective):
    """Chosen over rejected, chosen next to its images over chosen next to spoilt ones, and less
    divergence on the rejected side: one logit."""

    needs_reference: ClassVar[bool] = True
    reads: ClassVar[frozenset[Measure]] = TOKENS

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`; 0.1 in the authors' code."""
    token_beta: Annotated[float, AtLeast(0)] = 0.1
    """Weight of the divergence of tokens within the margin; 0 needs none."""
    condition: str = "diffuse"
    """What the images of the view `chosen@diffuse` were put through."""

    def __post_init__(self) -> None:
        super().__post_init__()
        View.parse(self._spoilt)

    @property
    def _spoilt(self) -> str:
        return f"chosen@{self.condition}"

    @property
    def views(self) -> frozenset[str]:
        """Both responses, and the chosen one next to spoilt images."""
        return frozenset({"chosen", "rejected", self._spoilt})

    @property
    def needs_divergence(self) -> bool:
        """Unless its weight is 0."""
        return self.token_beta > 0

    @property
    def holds_fixed(self) -> frozenset[str]:
        """The chosen side's divergence, where there is one."""
        return frozenset({"chosen.divergence"} if self.needs_divergence else ())

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].log_ratio, views["rejected"].log_ratio
        visual_margin = chosen - views[self._spoilt].log_ratio
        margin = chosen - rejected + visual_margin
        if self.needs_divergence:
            drifts = divergence_of(views["chosen"]).detach(), divergence_of(views["rejected"])
            margin = margin - self.token_beta * (drifts[1] - drifts[0])
        metrics = {
            **pair_metrics(self.beta * chosen, self.beta * rejected),
            "visual_margin": self.beta * visual_margin.detach(),
        }
        return LossOutput(dpo_loss(margin, beta=self.beta), metrics)
