"""Supervised fine-tuning: the negative log-likelihood of one view.

Usually a term of `weighted_sum` next to a preference (RPO, MPO), with the reduction of TRL and
most training code: the mean over all tokens, to which long responses contribute more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import AbstractObjective, Known, Likelihoods, LossOutput, Views

Per = Literal["token", "response"]


def negative_log_likelihood(view: Likelihoods, *, per: Per = "token") -> Tensor:
    """Negative log-likelihood of each row, such that the mean over rows is the mean `per` what.

    Args:
        view: the rows; their number of tokens is read where it is there.
        per: `token` for the mean over the tokens of the whole optimiser step on all ranks,
            `response` for the mean over its rows of each row's own mean over tokens.

    Returns:
        Shape [n]: the mean over the rows of all micro-batches is the mean `per` what.
        Where there is no length a row is a mean already, and both are the same.
    """
    if view.length is None or per == "response":
        return -view.average
    totals = view.totals
    return -view.policy * (totals.rows / totals.tokens)


@dataclass(frozen=True, kw_only=True)
class SFT(AbstractObjective):
    """Negative log-likelihood of the chosen view, without a reference."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen"})
    needs_reference: ClassVar[bool] = False
    takes_unpaired: ClassVar[bool] = True
    must_know: ClassVar[Known] = "counts"

    per: Per = "token"
    """`token` weighs all tokens of a step alike, as TRL; `response` all responses alike, as
    iterative reasoning preference optimisation (arXiv:2404.19733)."""

    def __call__(self, views: Views) -> LossOutput:
        chosen = views["chosen"]
        loss = negative_log_likelihood(chosen, per=self.per)
        return LossOutput(loss, {"average_log_likelihood": chosen.average.detach()})
