"""Images that the data set gives in place of the sample's own, under the name of the condition.

`retrieved` is a similar image of another sample (Re-Align, Xing et al. 2025, arXiv:2502.13146);
`rejected` the image of the rejected side, where a data set has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin


@dataclass(frozen=True, kw_only=True)
class Replaced(AbstractCondition):
    """The images that the row has for the condition of this name."""

    origin: ClassVar[Origin] = Origin.ROW
