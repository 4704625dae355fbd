"""Margin-aware preference optimisation: prefer the better denoised side, and learn it outright.

No reference is needed. A preference term compares how well the two sides are denoised, and a
supervised term lowers the error of the chosen side. For small errors the preference term is DPO
without a reference, at beta 500 in the units of `dpo.py`.

The denoising likelihood is minus half a mean squared error; the errors are read back from it, so
that every constant below is the one of the authors' code.

Source: Hong et al. 2024, arXiv:2406.06424, in the form of `compute_loss` of mapo-t2i/mapo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput, Measure
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import MoreThan

ERROR_SCALE = 0.5
"""Multiplies errors before they are scored; `snr_value` in the authors' code, where it is this
constant whatever the timestep."""
SCORE_SCALE = 1000.0
"""Multiplies scores; the number of training timesteps in the authors' code."""

_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)
"""Bernoulli numbers over factorials, B(2k) / (2k)! for k from 1."""
_SERIES_LIMIT = 0.5
"""Up to here the six terms are exact to 1e-15; beyond, nothing cancels that matters."""


def denoising_score(error: Tensor) -> Tensor:
    """How well a target was predicted: 1000 * (phi(c * error) - 1), phi(z) = z / (exp(z) - 1).

    The authors score by 1000 * phi; the constant drops out of the difference of two sides. Near 0
    phi is near 1, and what tells two small errors apart is lost in the rounding of that 1: in
    float32, at an error of 0.001, their form is off by 0.15. So phi - 1 is summed as its series.

    Args:
        error: mean squared error, shape [n], at least 0.

    Returns:
        Shape [n], from -1000 (hopeless) to 0 (perfect), falling; about -250 * error near 0.
    """
    z = ERROR_SCALE * error
    small = z < _SERIES_LIMIT
    # Each branch sees only arguments it can take: a NaN in the one not chosen would still reach
    # the gradient.
    near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    squared = near.square()
    tail = torch.zeros_like(near)
    for coefficient in reversed(_SERIES):
        tail = (tail + coefficient) * squared
    phi = -far * torch.exp(-far) / torch.expm1(-far)  # not over expm1(far), which overflows
    return SCORE_SCALE * torch.where(small, tail - near / 2, phi - 1)


@dataclass(frozen=True, kw_only=True)
class MaPO(AbstractPairObjective):
    """MaPO over one chosen and one rejected view of denoising likelihoods, without a reference."""

    needs_reference: ClassVar[bool] = False
    reads: ClassVar[frozenset[Measure]] = frozenset({"denoising error"})

    beta: Annotated[float, MoreThan(0, "at 0 it is fine-tuning on the chosen side")]
    """Weight of the preference term next to the error of the chosen side; 0.1 in the authors'
    code. Unlike DPO's it does not multiply the margin."""

    def reward(self, view: Likelihoods) -> Tensor:
        """The score of what was denoised, which beta does not scale."""
        return denoising_score(-2 * view.policy)

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        preference = -logsigmoid(self.reward(chosen) - self.reward(rejected))
        chosen_error = -2 * chosen.policy
        terms = {"supervised_term": chosen_error.detach(), "preference_term": preference.detach()}
        return LossOutput(chosen_error + self.beta * preference, terms)

    def note(self) -> str:
        """What its beta is not."""
        return (
            "error of the chosen side plus beta times a preference term, which is that of DPO "
            f"at Salesforce beta_dpo {SCORE_SCALE * ERROR_SCALE:g} without a reference"
        )
