"""Only some sentences count: what is right in the chosen response and wrong in the rejected one.

Source: Mask-DPO (Gu et al. 2025, arXiv:2503.02846). Its code finds sentences by the number of
tokens that each has alone, which drifts; here tokens are found by their characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.data.responses.token_weights.base import (
    AbstractTokenWeights,
    Encoded,
    Spans,
    span_of_tokens,
)
from diffalign.data.skipping import SkipReason, UnusableRowError


def _mask_dpo() -> dict[str, tuple[str, ...]]:
    return {"chosen": ("no_hallucination",), "rejected": ("hallucination",)}


@dataclass(frozen=True, kw_only=True)
class Sentences(AbstractTokenWeights):
    """1 for the tokens of sentences that are kept and for the end of the sequence, 0 for others."""

    kept: Mapping[str, tuple[str, ...]] = field(default_factory=_mask_dpo)
    """Response -> labels of the sentences that count."""

    def reads(self, response: str) -> frozenset[str]:
        if response not in self.kept:
            raise ValueError(
                f"weights of kind sentences keep sentences of {', '.join(self.kept)}, and are "
                f"asked for {response}: say in `kept` which labels of its sentences count"
            )
        return frozenset({response})

    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        belongs = span_of_tokens(response, encoded, spans)
        labels = [span.label for span in spans[response]]
        counts = torch.tensor([*(float(label in self.kept[response]) for label in labels), 0.0])
        weights = counts[belongs]  # -1, a token of no sentence, finds the zero at the end
        if not weights.any():
            found = ", ".join(sorted({str(label) for label in labels}))
            raise UnusableRowError(
                SkipReason.NOTHING_COUNTS,
                f"none of its sentences is {' or '.join(self.kept[response])} (there are {found})",
                response,
            )
        return torch.cat([weights, torch.ones(1)])
