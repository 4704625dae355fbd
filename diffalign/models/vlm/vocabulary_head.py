"""Log-probabilities of tokens by the head of a language model, a few positions at a time.

The gradient of a log-probability by the hidden state before it is one vector as wide as that state:
the head's row for the token, less the mean of its rows under the distribution. Where the head does
not train it is computed while the logits are there, so that the backward pass is a product with one
number a token, and no logit is computed twice. Where it trains, logits are computed again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bounded(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits x as c tanh(x / c); with a bound c of None as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        positions_at_once: int,
        softcap: float | None,
    ) -> Tensor:
        kind = hidden.device.type
        reduced = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if reduced else hidden.dtype
        ctx.dtype, ctx.hidden_dtype = dtype, hidden.dtype
        ctx.positions_at_once, ctx.softcap = positions_at_once, softcap
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keeps_slopes = ctx.needs_input_grad[0] and not trains
        slopes = torch.empty_like(hidden, dtype=dtype) if keeps_slopes else None
        exact = torch.promote_types(dtype, torch.float32)
        found, head = hidden.new_empty(len(hidden), dtype=exact), weight.to(dtype)
        room = _room(hidden, head, positions_at_once)
        for first in range(0, len(hidden), positions_at_once):
            some = slice(first, first + positions_at_once)
            wanted = targets[some, None]
            scores = bounded(_logits(hidden[some].to(dtype), head, bias, room), softcap).to(exact)
            own, bend = scores.gather(1, wanted), _bend(scores, softcap)
            most, total = _exponentiate(scores)
            found[some] = (own - most - total.log())[:, 0]
            if slopes is not None:
                slopes[some] = (
                    torch.mm(_slopes(scores, total, wanted, bend).to(dtype), head) / total
                )
        ctx.save_for_backward(*([hidden, weight, bias, targets] if trains else [slopes]))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0][:, None]
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return (gradient * slopes).to(ctx.hidden_dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        dtype, at_once = ctx.dtype, ctx.positions_at_once
        head, exact = weight.to(dtype), gradient.dtype
        of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        room = _room(hidden, head, at_once)
        for first in range(0, len(hidden), at_once):
            some = slice(first, first + at_once)
            states = hidden[some].to(dtype)
            scores = bounded(_logits(states, head, bias, room), ctx.softcap).to(exact)
            bend = _bend(scores, ctx.softcap)
            _, total = _exponentiate(scores)
            slopes = _slopes(scores, total, targets[some, None], bend)
            slopes.mul_(gradient[some] / total)
            of_hidden[some] = torch.mm(slopes.to(dtype), head)
            of_weight += torch.mm(slopes.to(dtype).T, states)
            if of_bias is not None:
                of_bias += slopes.sum(dim=0)
        return of_hidden, of_weight, of_bias, None, None, None


def _room(hidden: Tensor, head: Tensor, positions_at_once: int) -> Tensor:
    """Memory of logits, the same for all pieces: to get it anew takes longer than a sum over it."""
    return head.new_empty((min(len(hidden), positions_at_once), len(head)))


def _logits(states: Tensor, head: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    logits = torch.mm(states, head.T, out=room[: len(states)])
    return logits if bias is None else logits.add_(bias)


def _exponentiate(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Make of scores exponentials of what they are below their maximum; that, and their sums."""
    most = scores.amax(dim=1, keepdim=True)
    return most, scores.sub_(most).exp_().sum(dim=1, keepdim=True)


def _bend(scores: Tensor, softcap: float | None) -> Tensor | None:
    """Gradient of bounded logits by what they were before; None where they are not bounded."""
    return None if softcap is None else 1 - (scores / softcap) ** 2


def _slopes(exponentials: Tensor, total: Tensor, wanted: Tensor, bend: Tensor | None) -> Tensor:
    """`total` times the gradient of the wanted log-probability by each logit, in place: before it
    is rounded to half precision, since the probability may be close to 1."""
    slopes = exponentials.neg_().scatter_add_(1, wanted, total)
    return slopes if bend is None else slopes.mul_(bend)


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    positions_at_once: int,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of one token at each of P positions, in nats.

    Args:
        hidden: states before the tokens, [P, width].
        weight, bias: of the head, [vocabulary, width] and [vocabulary].
        targets: int64 [P].
        positions_at_once: positions whose logits exist at the same time.
        softcap: bound of the logits, see `bounded`.

    Returns:
        Shape [P], float32 (float64 for float64 states). Computed as autocast has it.
    """
    found: Tensor = _HeadLogProbs.apply(hidden, weight, bias, targets, positions_at_once, softcap)
    return found
