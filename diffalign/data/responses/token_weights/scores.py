"""Sentences count by the score that a judge gave them, or by the kind of mistake.

Source: OPA-DPO (Yang et al. 2025, arXiv:2501.09695): the worse a sentence was judged (1 to 4), the
more it counts, in the original and in the revised response; between images, sentences with
mistakes of recognition count threefold. The end of the model's own response counts nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.data.responses.records import Span
from diffalign.data.responses.token_weights.base import (
    AbstractTokenWeights,
    Encoded,
    Spans,
    span_of_tokens,
)


@dataclass(frozen=True, kw_only=True)
class Scores(AbstractTokenWeights):
    """A table from score or label of a sentence to the weight of its tokens.

    OPA-DPO has `by_score: {1: 2.5, 2: 2.0, 3: 1.5, 4: 1.0}` for its text terms, and
    `by_label: {image_recognition_error: 3.0}` for its image terms. What has no score or label in
    the table, such as a sentence that was added, counts 1.
    """

    by_score: Mapping[str, float] = field(default_factory=dict)
    """Score, as a whole number -> weight."""
    by_label: Mapping[str, float] = field(default_factory=dict)
    """Label -> weight. Exactly one of the two tables is to be given."""
    open_ended: tuple[str, ...] = ("rejected",)
    """Responses whose end-of-sequence token counts nothing; elsewhere it counts as much as the last
    sentence."""

    def __post_init__(self) -> None:
        if bool(self.by_score) == bool(self.by_label):
            raise ValueError("give one of by_score and by_label, a table of weights")
        if any(weight < 0 for weight in (*self.by_score.values(), *self.by_label.values())):
            raise ValueError("weights must not be negative")
        strange = [score for score in self.by_score if not score.lstrip("-").isdigit()]
        if strange:
            raise ValueError(f"keys of by_score are whole numbers, got {', '.join(strange)}")

    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        belongs = span_of_tokens(response, encoded, spans)
        table = torch.tensor([*(self._weight(span) for span in spans[response]), 1.0])
        weights = table[belongs]  # -1, a token of no sentence, finds the one at the end
        end = torch.zeros(1) if response in self.open_ended else weights[-1:]
        return torch.cat([weights, end])

    def _weight(self, span: Span) -> float:
        if self.by_label:
            return self.by_label.get(span.label or "", 1.0)
        return 1.0 if span.score is None else self.by_score.get(f"{span.score:g}", 1.0)
