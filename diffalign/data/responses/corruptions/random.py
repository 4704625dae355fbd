"""Any other image of the training data, sampled anew for each visit of a sample.

Source: an ablation of mDPO (Wang et al. 2024, arXiv:2406.11839), where it does worse than a crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin


@dataclass(frozen=True, kw_only=True)
class Random(AbstractCondition):
    """An image of another sample."""

    origin: ClassVar[Origin] = Origin.ANOTHER
