"""Three pairs of responses by their token log-probabilities, which published values are of."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.objectives.base import Likelihoods, TokenLikelihoods

Rows = list[list[float]]

CHOSEN: tuple[Rows, Rows] = (
    [[-0.50, -1.25, -0.75], [-0.20, -0.90], [-1.50, -0.30, -2.00, -0.60]],
    [[-0.70, -1.40, -1.00], [-0.30, -0.70], [-1.90, -0.60, -1.80, -0.90]],
)
"""Of the policy, and of the reference."""
REJECTED: tuple[Rows, Rows] = (
    [[-0.80, -1.10, -0.40, -1.70], [-0.60, -0.70, -0.35], [-0.90, -0.25]],
    [[-0.60, -1.30, -0.20, -1.50], [-0.50, -1.05, -0.40], [-0.85, -0.20]],
)
SPOILT = ([-3.4, -1.6, -5.0], [-3.3, -1.2, -5.6])
"""Sums of the chosen responses next to spoilt images."""
DIVERGENCES = ([0.20, 0.10, 0.30], [0.25, 0.40, 0.05])
"""Of chosen and rejected responses."""
GOLD: Rows = [[-0.4, -1.0], [-0.5, -0.5, -0.2], [-1.2]]


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def summed(policy: Rows, reference: Rows | None = None) -> Likelihoods:
    """Sums over tokens, with their number; the policy takes gradient."""
    return Likelihoods(
        numbers([sum(row) for row in policy]).requires_grad_(),
        None if reference is None else numbers([sum(row) for row in reference]),
        length=torch.tensor([len(row) for row in policy]),
    )


def averaged(view: Likelihoods) -> Likelihoods:
    """Means over tokens, as a likelihood with `reduction: mean` gives them."""
    reference = None if view.reference is None else view.reference / view.length
    return Likelihoods(view.average.detach().requires_grad_(), reference)


def plain(policy: list[float], reference: list[float]) -> Likelihoods:
    """Rows of unknown length."""
    return Likelihoods(numbers(policy).requires_grad_(), numbers(reference))


def responses() -> dict[str, Likelihoods]:
    """Every view of the three pairs, of sums over tokens."""
    chosen, rejected = (
        Likelihoods(view.policy, view.reference, view.length, divergence=numbers(divergence))
        for view, divergence in zip((summed(*CHOSEN), summed(*REJECTED)), DIVERGENCES, strict=True)
    )
    spoilt = plain(*SPOILT)
    return {
        "chosen": chosen,
        "rejected": rejected,
        "gold": summed(GOLD),
        **{f"chosen@{condition}": spoilt for condition in ("crop", "diffuse", "retrieved")},
    }


def averages() -> dict[str, Likelihoods]:
    """The same pairs as means over tokens."""
    return {name: averaged(view) for name, view in responses().items() if view.length is not None}


def row_of(views: dict[str, Likelihoods], row: int) -> dict[str, Likelihoods]:
    """One pair alone."""

    def only(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row : row + 1]

    return {
        name: Likelihoods(
            view.policy[row : row + 1],
            only(view.reference),
            only(view.length),
            only(view.weight),
            divergence=only(view.divergence),
        )
        for name, view in views.items()
    }


SAMPLED: tuple[Rows, Rows, Rows] = (
    [
        [-0.5, -1.2, -0.8],
        [-0.3, -0.9],
        [-1.1, -0.4, -0.7, -0.2],
        [-0.6, -0.6],
        [-1.4, -0.25, -0.95],
        [-0.35, -0.8, -1.3, -0.45],
    ],
    [
        [-0.7, -1.1, -1.0],
        [-0.35, -0.6],
        [-1.0, -0.8, -0.65, -0.3],
        [-0.2, -0.7],
        [-1.5, -0.5, -0.9],
        [-0.4, -0.75, -1.0, -0.5],
    ],
    [
        [-0.6, -1.3, -0.9],
        [-0.5, -0.7],
        [-1.3, -0.6, -0.6, -0.4],
        [-0.4, -0.9],
        [-1.2, -0.4, -1.1],
        [-0.3, -1.0, -1.2, -0.6],
    ],
)
"""Three responses to each of two prompts: of the policy, when they were sampled, of the reference.
Their rewards are 1, 0.2, 0.5, and 0, 2, 1."""
GROUP_ADVANTAGES = [
    1.071956688003,
    -0.907040274464,
    -0.164916413539,
    -0.999900009999,
    0.999900009999,
    0.0,
]
"""(reward - mean) / (standard deviation + 1e-4) within the responses to a prompt."""


def padded(rows: Rows) -> Tensor:
    """[n, T], zeros behind shorter rows."""
    return torch.nn.utils.rnn.pad_sequence([numbers(row) for row in rows], batch_first=True)


def sampled_responses(
    *, old: bool = True, advantage: list[float] = GROUP_ADVANTAGES
) -> Likelihoods:
    """The view `sampled`, whose tokens take gradient; without `old` as straight after sampling."""
    policy, before, reference = map(padded, SAMPLED)
    policy.requires_grad_()
    tokens = TokenLikelihoods(
        policy=policy,
        weights=padded([[1.0] * len(row) for row in SAMPLED[0]]),
        old=before if old else None,
        reference=reference,
    )
    return Likelihoods(
        policy.sum(dim=1),
        reference.sum(dim=1),
        length=numbers([len(row) for row in SAMPLED[0]]),
        advantage=numbers(advantage),
        tokens=tokens,
    )
