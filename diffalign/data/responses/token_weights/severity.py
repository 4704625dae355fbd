"""All tokens of a response count by how severe its mistakes are.

Where the rejected response has a severity s its log-ratio counts s times, under policy and
reference: a response with grave mistakes is pushed away sooner. That is no weight of the pair: it
moves where the loss comes to rest, and makes it larger where the rejected response has become more
likely.

Source: HSA-DPO (Xiao et al. 2024, arXiv:2404.14233), as in Mr-Loevan/HSA-DPO, which weighs the
rejected response alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from diffalign.data.responses.token_weights.base import AbstractTokenWeights, Encoded, Spans
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.ranges import MoreThan


@dataclass(frozen=True, kw_only=True)
class Severity(AbstractTokenWeights):
    """The mean of the scores of a response's judged parts, times `scale`, for each of its tokens.

    Parts without a score are left out of the mean.
    """

    scale: Annotated[float, MoreThan(0)] = 1.0
    """What a score is multiplied by."""

    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        scores = [part.score for part in spans.get(response, ()) if part.score is not None]
        severity = self.scale * sum(scores) / len(scores) if scores else 0.0
        if not severity > 0:
            said = f"the mean score of its parts is {severity:g}" if scores else "no part of it"
            detail = f"{said}, and a severity is above 0" if scores else f"{said} has a score"
            raise UnusableRowError(SkipReason.UNJUDGED, detail, response)
        return torch.full((len(encoded[response].tokens),), severity)
