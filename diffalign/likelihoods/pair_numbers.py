"""What a model says of pairs of responses before it is trained on them, one number a pair.

`ches` says how far training will push down both sides of a pair at once: the chosen and the
rejected response look alike in the model's hidden states, and what lowers one lowers the other
(likelihood displacement). `difficulty` says how far the model is from preferring the chosen one.

Sources: Razin et al. 2024, arXiv:2410.08847 (CHES, of which the lowest are kept); Chen et al. 2024,
arXiv:2405.19534 (pairs that the reference ranks far the other way round are hardly learnt).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.data.batches import TokenBatch
from diffalign.likelihoods.tokens import PreparedTokens, Tokens
from diffalign.models.vlm.model import VisionLanguageModel

PAIR = frozenset({"chosen", "rejected"})

PAIR_NUMBERS: Mapping[str, str] = {
    "ches": "how alike the hidden states of both responses are, less those of the chosen alone",
    "ches_normalised": "the same by means over tokens in place of sums",
    "difficulty": "log-probability of the rejected response less that of the chosen, a token",
    "difficulty_of_sums": "the same of whole responses, where length alone may decide",
}
"""What each number is, by its name."""


def ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Centred similarity of the hidden states of two responses.

    Args:
        chosen, rejected: sums of the last layer's hidden states over the positions that predict a
            token of the response: from the last token of the prompt to the last but one of the
            row, [n, width]. With means in place of sums it is normalised by lengths.

    Returns:
        <chosen, rejected> - |chosen|^2, [n]. High values displace: the gradient of the rejected
        response lowers the chosen one.
    """
    return (chosen * rejected).sum(dim=1) - chosen.square().sum(dim=1)


@torch.no_grad()
def pair_numbers(model: VisionLanguageModel, batch: TokenBatch) -> dict[str, Tensor]:
    """The numbers of `PAIR_NUMBERS` for the pairs of a batch, under the model as it is.

    Args:
        model: loaded; nothing is kept in it.
        batch: with the views `chosen` and `rejected`, whatever others it serves.

    Returns:
        By name, float64 [B] on the CPU.
    """
    prepared = Tokens().prepare(model, batch.seen_in(PAIR))
    with model.inference():
        scores = model.score(prepared.groups, keep_states=True)
    hidden = torch.cat([some.states.hidden for some in scores if some.states is not None])
    log_probs = torch.cat([some.log_probs for some in scores])
    states, counts = _summed(prepared, hidden)
    totals, _ = _summed(prepared, log_probs)
    return numbers_of(states, {side: total[:, 0] for side, total in totals.items()}, counts)


def numbers_of(
    states: Mapping[str, Tensor], log_probs: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The numbers of `PAIR_NUMBERS` of B pairs, [B] each.

    Args:
        states: by side, sums of hidden states over a response, [B, width].
        log_probs: by side, of responses, [B].
        counts: by side, tokens of responses, [B].
    """
    means = {side: states[side] / counts[side][:, None] for side in PAIR}
    of_token = {side: log_probs[side] / counts[side] for side in PAIR}
    return {
        "ches": ches(states["chosen"], states["rejected"]),
        "ches_normalised": ches(means["chosen"], means["rejected"]),
        "difficulty": of_token["rejected"] - of_token["chosen"],
        "difficulty_of_sums": log_probs["rejected"] - log_probs["chosen"],
    }


def _summed(
    prepared: PreparedTokens, values: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over the tokens of each response, float64 [B, k], and their number [B], by view."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    of_cells: Any = prepared.of_cells(values.double().cpu())
    for name, view in prepared.views.items():
        tokens, found = prepared.tokens[view.group], of_cells[view.group]
        empty = torch.zeros(tokens.shape[0], found.shape[1], dtype=torch.float64)
        sums[name] = empty.index_add(0, tokens.rows.cpu(), found)
        counts[name] = torch.bincount(tokens.rows.cpu(), minlength=tokens.shape[0])
    return sums, counts
