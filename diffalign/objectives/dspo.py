"""Direct score preference optimisation: fine-tuning towards a score that has moved off the
reference's.

The score of preferred images is that of the images plus the gradient of log P(preferred), and the
second is a share of what policy and reference differ by. So the chosen side's residual is taken a
share g = w (1 - sigmoid(beta * margin)) of the way from the policy's to the reference's, and its
square is the loss: with P and Q the squared errors of policy and reference and D the squared
distance of their predictions it is (1 - g) P + g Q - g (1 - g) D, in which nothing large cancels.

The rejected side is seen through the sigmoid alone. In the authors' code one number is both beta
and w, 0.001 to 0.05: there the sigmoid is one half whatever the rejected image, and what is left is
fine-tuning on the chosen side, to four digits. `beta` and `share` are two settings here, so that
beta may be one of DPO; a share above 1, which that code has at such a beta, is refused: its losses
are of 10,000 in size.

For SDXL the authors' code has another loss: where the batch mean of D is below 0.1, which it is as
long as the policy is near its reference, a constant takes the place of the residual and the loss is
(1 - sigmoid)^2, which never looks at what was predicted but for the margin; above, it is that times
D, which is smallest where nothing was learnt. Neither is here.

Source: Zhu, Xiao and Honavar 2025, DSPO (ICLR), in the form of huaishengzhu/DSPO for SD 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.objectives.base import Likelihoods, LossOutput, Measure, Measured
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import Between


def dspo_loss(
    error: Tensor,
    reference_error: Tensor,
    distance: Tensor,
    margin: Tensor,
    *,
    beta: float,
    share: float,
) -> Tensor:
    """Mean square of the residual of a prediction a share of the way to the reference's.

    Args:
        error: mean squared error of the policy on the chosen side, shape [B].
        reference_error: of the reference, [B].
        distance: mean squared difference of the two predictions, [B].
        margin: log-ratio of the chosen side minus that of the rejected side, [B].
        beta: multiplies the margin; greater than 0.
        share: of the way that is gone where the pair is judged wrongly, and half of which at a
            margin of 0; the authors' beta.

    Returns:
        Shape [B]; the error itself where policy and reference agree.
    """
    gone = share * torch.sigmoid(-beta * margin)
    return (1 - gone) * error + gone * reference_error - gone * (1 - gone) * distance


@dataclass(frozen=True, kw_only=True)
class DSPO(AbstractPairObjective):
    """DSPO over one chosen and one rejected view of denoising likelihoods, whose likelihood
    measures the distance of policy and reference."""

    reads: ClassVar[frozenset[Measure]] = frozenset({"denoising error"})
    needs_measured: ClassVar[frozenset[Measured]] = frozenset({"distance"})

    share: (
        Annotated[float, Between(0, 1, "it is a share of the way to the reference", without=[0])]
        | None
    ) = None
    """How much of the way to the reference's residual a wrongly judged pair goes, above 0 and at
    most 1; null takes `beta` for it, as the authors' code does, with 0.001 to 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is None and self.beta > 1:
            raise ValueError(
                f"beta is {self.beta:g} and share is null, so that beta would be the share of the "
                f"way to the reference as well, which is at most 1: give share, such as 0.5, or a "
                f"beta of the authors, 0.001 to 0.05"
            )

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        assert chosen.reference is not None and chosen.distance is not None, "the run was checked"
        loss = dspo_loss(
            -2 * chosen.policy,
            -2 * chosen.reference,
            chosen.distance,
            chosen.log_ratio - rejected.log_ratio,
            beta=self.beta,
            share=self.beta if self.share is None else self.share,
        )
        return LossOutput(loss, {"distance": chosen.distance.detach()})

    def note(self) -> str:
        """What the rejected side does, where it is next to nothing."""
        if self.share is not None:
            return f"a residual up to {self.share:g} of the way to the reference's"
        return (
            f"beta is also the share, as released: the rejected side hardly counts at {self.beta:g}"
        )
