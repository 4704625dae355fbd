"""Distributional dispreference: away from a rejected response, towards what one's own are.

No response is good here. The rejected one is compared with the mean over K responses that the
policy, or its reference, sampled to the same prompt: what is unlearnt is how the rejected one
differs from all of them.

Source: Duan et al. 2024, arXiv:2403.03419 (D2O), with one reference for both; no code of the
authors is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, LossOutput, Views
from diffalign.objectives.pair import Beta, pair_metrics


@dataclass(frozen=True, kw_only=True)
class D2O(AbstractObjective):
    """The rejected view against the mean of sampled ones."""

    needs_reference: ClassVar[bool] = True

    beta: Beta
    """Pull of the sampled responses towards the reference, in the units of `dpo.py`."""
    alpha: Beta
    """The same of the rejected one; as large as beta in the simple form."""
    sampled: tuple[str, ...] = ("sampled",)
    """Views of the responses that were sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sampled or "rejected" in self.sampled:
            raise ValueError(
                f"sampled names views that the rejected one is compared with, got "
                f"{', '.join(self.sampled) or 'none'}"
            )

    @property
    def views(self) -> frozenset[str]:
        """The rejected view and the sampled ones."""
        return frozenset({"rejected", *self.sampled})

    def __call__(self, views: Views) -> LossOutput:
        own = torch.stack([views[name].log_ratio for name in self.sampled]).mean(dim=0)
        rewards = self.beta * own, self.alpha * views["rejected"].log_ratio
        return LossOutput(-logsigmoid(rewards[0] - rewards[1]), pair_metrics(*rewards))
