"""Tokens that differ between the two responses count more: fine-grained corrections.

Source: RLHF-V (Yu et al. 2023, arXiv:2312.00849), dense DPO: the score of a response is
(sum over unchanged + gamma * sum over changed) / (unchanged + gamma * changed), gamma 5. Its code
leaves the division out unless asked; `normalised: false` does too.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from diffalign.data.responses.token_weights.base import AbstractTokenWeights, Encoded, Spans
from diffalign.ranges import AtLeast

SHORTEST_MATCH = 3
"""Tokens that two texts must have in common in a row to count as the same there."""

_BEFORE: list[int] = [-1] * SHORTEST_MATCH
"""Stands for the prompt, which both have in common; no token has this number."""


def changed_tokens(first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions in two sequences where one was rewritten into the other.

    Runs of tokens between matching blocks that are not empty on either side; what was only inserted
    or only removed is not among them. Matching blocks shorter than three tokens do not count.

    Args:
        first: token ids.
        second: token ids.

    Source: RLHF-V/RLAIF-V, muffin/utils/diff_lib.py. Frequent tokens of long sequences are compared
    like all others (difflib's `autojunk` is off).
    """
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    *matches, end = matcher.get_matching_blocks()
    changed_first: list[int] = []
    changed_second: list[int] = []
    i = j = 0
    for block in [*(match for match in matches if match.size >= SHORTEST_MATCH), end]:
        if i < block.a and j < block.b:
            changed_first.extend(range(i, block.a))
            changed_second.extend(range(j, block.b))
        i, j = block.a + block.size, block.b + block.size
    return changed_first, changed_second


@dataclass(frozen=True, kw_only=True)
class Changed(AbstractTokenWeights):
    """`gamma` for tokens that differ between two responses, 1 for the others."""

    gamma: Annotated[float, AtLeast(0)] = 5.0
    """Weight of a changed token relative to an unchanged one."""
    normalised: bool = True
    """Divide by the sum of the weights, so that the weighted sum is a weighted mean (the paper's
    equation; its code does not by default)."""
    between: tuple[str, ...] = ("chosen", "rejected")
    """The two responses that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.between)) != 2:
            raise ValueError(f"between must name two responses, got {list(self.between)}")

    def reads(self, response: str) -> frozenset[str]:
        if response not in self.between:
            raise ValueError(
                f"weights of kind changed compare {' and '.join(self.between)}, and are asked for "
                f"{response}: name it in `between`"
            )
        return frozenset(self.between)

    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        (other,) = set(self.between) - {response}
        own, others = (encoded[name].tokens.tolist() for name in (response, other))
        changed, _ = changed_tokens(_BEFORE + own, _BEFORE + others)
        weights = torch.ones(len(_BEFORE) + len(own))
        weights[changed] = self.gamma
        weights = weights[len(_BEFORE) :]
        return weights / weights.sum() if self.normalised else weights
