"""What losses of pairs share: two sides, either order of them, and how sure a pair is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.objectives.base import (
    AbstractObjective,
    Known,
    Likelihoods,
    LossOutput,
    Part,
    Views,
)
from diffalign.ranges import MoreThan
from diffalign.views import View


def side_metrics(views: Views, chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """`pair_metrics`, or what of it has a meaning where no sample has both sides: the rewards.

    Args:
        views: `chosen` and `rejected`.
        chosen_reward: beta times log-ratio of the chosen rows.
        rejected_reward: the same for the rejected rows.
    """
    if views["chosen"].rows is None:
        return pair_metrics(chosen_reward, rejected_reward)
    return {
        "chosen_reward": chosen_reward.detach(),
        "rejected_reward": rejected_reward.detach(),
    }


def pair_metrics(
    chosen_reward: Tensor, rejected_reward: Tensor, preference: Tensor | None = None
) -> dict[str, Tensor]:
    """The figures every pairwise objective reports, detached.

    Args:
        chosen_reward: beta times log-ratio of the preferred side, shape [n].
        rejected_reward: the same for the other side, shape [n].
        preference: probability that the chosen side is preferred, shape [n]; None for 1.

    Returns:
        `accuracy` counts a zero margin as one half: the policy has no opinion yet, and neither 0
        nor 1 at the first step would say so. So it does where the pair itself has none.
    """
    chosen, rejected = chosen_reward.detach(), rejected_reward.detach()
    margin = chosen - rejected
    figures = {
        "accuracy": (margin.sign() + 1) / 2,
        "margin": margin,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    if preference is not None:
        agreed = margin * (preference - 0.5).sign()
        figures["accuracy"] = (agreed.sign() + 1) / 2
    return figures


CHOSEN_AND_REJECTED = frozenset({"chosen", "rejected"})

EITHER_ORDER: frozenset[Part] = frozenset({"preference", "weight"})
"""What `expected_loss` reads of a pair."""

Beta = Annotated[float, MoreThan(0, "at 0 nothing is learnt")]


def expected_loss(
    views: Views,
    loss: Callable[[Views], LossOutput],
    *,
    known: Known = "nothing",
    others: Views | None = None,
) -> LossOutput:
    """The mean of a loss over both orders of each pair, by the probability of either, times the
    weight of the pair.

    With the logistic loss of a margin s and weight 1 this is the soft cross-entropy
    -p log sigmoid(s) - (1 - p) log sigmoid(-s).

    Args:
        views: as the labels have them, whose `preference` and `weight` are those of their pairs.
        loss: of one order, for each pair by itself.
        known: what the loss must know of the whole step.
        others: the views with the two sides of each pair exchanged; None makes them.

    Returns:
        Shape [n], and the figures of the order of the labels. Where the preference is None or 1,
        loss and gradient are those of that order alone, to the last bit.
    """
    first = loss(views)
    pair = next(iter(views.values()))
    total, metrics = first.loss, first.metrics
    if pair.preference is not None:
        metrics = {**metrics, "preference": pair.preference}
        certain = pair.preference == 1
        others = exchanged(views, known) if others is None else others
        second = loss({name: _where(certain, views[name], others[name]) for name in views})
        mixed = pair.preference * first.loss + (1 - pair.preference) * second.loss
        total = torch.where(certain, first.loss, mixed)
    return LossOutput(total if pair.weight is None else pair.weight * total, metrics)


def _where(certain: Tensor, labelled: Likelihoods, exchanged: Likelihoods) -> Likelihoods:
    """The exchanged rows, and in place of those that do not count the labelled ones, which are
    finite wherever the loss is, without gradient."""

    def rows(known: Tensor | None, other: Tensor | None) -> Tensor | None:
        if known is None or other is None:
            return other
        return torch.where(certain, known.detach(), other)

    return replace(
        exchanged,
        policy=torch.where(certain, labelled.policy.detach(), exchanged.policy),
        reference=rows(labelled.reference, exchanged.reference),
        length=rows(labelled.length, exchanged.length),
        divergence=rows(labelled.divergence, exchanged.divergence),
        distance=rows(labelled.distance, exchanged.distance),
    )


def exchanged_name(name: str) -> str:
    """The view of the other side, under the same condition and weights; another response's own."""
    view = View.parse(name)
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return str(replace(view, response=sides.get(view.response, view.response)))


def exchanged(views: Views, known: Known = "nothing") -> dict[str, Likelihoods]:
    """The views with the two sides of each pair exchanged; one whose other side is not there stays.

    Args:
        views: of a batch.
        known: what the loss must know of the whole step, which goes with the rows.
    """
    others = {name: views.get(exchanged_name(name), view) for name, view in views.items()}
    if known == "nothing":
        return others
    return {name: replace(view, whole_step=view.totals) for name, view in others.items()}


@dataclass(frozen=True, kw_only=True)
class AbstractPairObjective(AbstractObjective):
    """A loss over one chosen and one rejected view: `pair_loss` is all that it has to say.

    Accuracy, margin and rewards are logged for every one of them. Of what data says of a pair,
    `__call__` reads the preference (see `expected_loss`), multiplies the loss of a pair by its
    weight, and asks for its margin where `compares_rewards`.
    """

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = True
    compares_rewards: ClassVar[bool] = False
    """Whether the loss is a function of the difference of both sides' log-ratios times beta, which
    a margin is subtracted from."""

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""

    @abc.abstractmethod
    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        """One loss per pair, [n], and what should be logged with the rewards."""

    @property
    def takes_strength(self) -> frozenset[Part]:
        """Preference and weight, and the margin where rewards are compared."""
        compared: frozenset[Part] = frozenset({"margin"} if self.compares_rewards else ())
        return compared | EITHER_ORDER

    def score(self, view: Likelihoods) -> Tensor:
        """What is compared of the two sides, [n]: the log-ratio, unless there is no reference."""
        return view.log_ratio

    def reward(self, view: Likelihoods) -> Tensor:
        """Beta times the score, [n]; what accuracy, margin and rewards are of."""
        return self.beta * self.score(view)

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"], views["rejected"]
        labelled = {"chosen": chosen, "rejected": rejected}
        if chosen.margin is not None:  # a reward less its margin is that of a higher reference
            assert chosen.reference is not None, "rewards are compared with a reference's"
            higher = chosen.reference + chosen.margin / self.beta
            labelled["chosen"] = replace(chosen, reference=higher)
        output = expected_loss(
            labelled,
            lambda views: self.pair_loss(views["chosen"], views["rejected"]),
            known=self.must_know,
        )
        rewards = pair_metrics(self.reward(chosen), self.reward(rejected), chosen.preference)
        return LossOutput(output.loss, {**rewards, **output.metrics})
