"""What every objective takes and gives.

An objective sees one record of log-likelihoods per named view of the batch and returns one loss per
example. It does not know whether the numbers came from a denoiser or from tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffalign import world
from diffalign.ranges import MoreThan, Ranged
from diffalign.views import View

Known = Literal["nothing", "counts", "log_ratios", "every_row"]
"""What a loss must know of a whole optimiser step before it is computed for any part of it: no
more than its own rows; how many rows and tokens there are; the sum of the policy's log-ratios as
well; or every row by itself."""


Part = Literal["preference", "margin", "target", "weight", "advantage"]
"""What data can say of a pair besides its order; of single responses, their advantage."""


Measured = Literal["distance", "embedding", "typicality"]
"""Fields of `Likelihoods` that a likelihood measures if it is told to."""


@dataclass(frozen=True)
class StepTotals:
    """What one view amounts to in a whole optimiser step: all micro-batches, on all ranks.

    Scalars without gradient. A loss that divides by one of them does not depend on how the step is
    cut into micro-batches.
    """

    step: int
    """Number of the optimiser step, by which a loss with a memory tells its parts from a new one;
    -1 where a micro-batch represents itself."""
    micro_batches: Tensor
    """How many there are: the trainer takes the mean over them of each one's mean loss."""
    rows: Tensor
    tokens: Tensor
    """Sum of the lengths; 0 where there are none."""
    weight: Tensor
    """Sum of the weights; 0 where there are none."""
    log_ratio: Tensor
    """Sum of the log-ratios; 0 where there is no reference, or none was asked for."""
    every_row: Tensor | None = None
    """Policy and reference of every row, [N, 2], rank by rank, each with as many; None where nobody
    asked for it."""

    @classmethod
    def of(
        cls, parts: Sequence[Likelihoods], *, step: int = -1, every_row: bool = False
    ) -> StepTotals:
        """Add up the parts of a view that this rank has, and those of the other ranks.

        Args:
            parts: of every micro-batch, on one device.
            step: number of the optimiser step.
            every_row: keep the rows as well; they have a reference.
        """

        zero = parts[0].policy.detach().new_zeros(())

        def summed(values: Sequence[Tensor | None]) -> Tensor:
            known = [value.detach().sum().to(zero) for value in values if value is not None]
            return torch.stack(known).sum() if known else zero

        ratios = [None if part.reference is None else part.log_ratio for part in parts]
        figures = torch.stack(
            [
                zero + len(parts),
                zero + sum(part.policy.numel() for part in parts),
                summed([part.length for part in parts]),
                summed([part.weight for part in parts]),
                summed(ratios),
            ]
        )
        rows = None
        if every_row:
            sides = [(part.policy, part.reference) for part in parts]
            each = [
                torch.stack([policy.detach(), known], dim=1)
                for policy, known in sides
                if known is not None
            ]
            rows = world.joined(torch.cat(each))
        return replace(cls(step, *world.total(figures)), every_row=rows)


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of the rows of one view."""

    policy: Tensor
    """Under the model in training, shape [n], float32; carries gradient."""
    reference: Tensor | None = None
    """Under the fixed reference, shape [n], float32; None for reference-free objectives."""
    length: Tensor | None = None
    """Number of tokens that each row sums over, shape [n]; None where a row is a mean, or no sum of
    tokens at all."""
    weight: Tensor | None = None
    """Importance of each row, shape [n]."""
    divergence: Tensor | None = None
    """Sum over the tokens of KL(reference || policy), shape [n]; carries gradient."""
    overlap: Tensor | None = None
    """Mean over elements of the product of this row's residual (prediction minus target) and that
    of the other side of its pair, shape [n], without gradient; None where none was measured. With
    the two denoising errors it says how far both sides' gradients point the same way."""
    distance: Tensor | None = None
    """Mean over elements of the squared difference of the policy's prediction from the reference's,
    shape [n]; carries gradient. With both denoising errors it gives the inner product of the two
    residuals: half of what the errors exceed it by."""
    embedding: Tensor | None = None
    """What each row is about, [n, width], without gradient, for cosines between rows."""
    typicality: Tensor | None = None
    """Mean over tokens of the policy's log-probability less the logarithm of the one that its own
    samples have on average, [n], without gradient; 0 where they are alike."""
    rows: Tensor | None = None
    """Which samples of the batch the rows are, int64 [n], where each sample has one view; n may
    then be 0. None where row i of every view is sample i."""
    whole_step: StepTotals | None = None
    """Of the optimiser step that the rows are part of; None where they are all of it."""
    preference: Tensor | None = None
    """Probability that the chosen side of each row's pair is the preferred one, shape [n], in
    [0, 1], the same in the views of both sides; None where it certainly is."""
    margin: Tensor | None = None
    """How much the reward of the chosen side should exceed that of the rejected one, shape [n], in
    the units of beta times a log-ratio; None for 0."""
    target: Tensor | None = None
    """What the difference of the two sides' rewards should be, shape [n], in the same units, for
    losses that regress it; None where nobody says it."""
    advantage: Tensor | None = None
    """How much better each row is than others to the same question, shape [n]; may be negative.
    See `objectives.advantages`."""

    @property
    def log_ratio(self) -> Tensor:
        """Policy minus reference, shape [n].

        Raises:
            ValueError: there is no reference; the objective should have declared that it needs one.
        """
        if self.reference is None:
            raise ValueError("a log-ratio needs reference likelihoods, and this view has none")
        return self.policy - self.reference

    @property
    def totals(self) -> StepTotals:
        """Of the optimiser step; of these rows on all ranks where they are all of it."""
        return StepTotals.of([self]) if self.whole_step is None else self.whole_step

    @property
    def average(self) -> Tensor:
        """Policy per token, shape [n]; what `policy` is already where there is no length."""
        return self.policy if self.length is None else self.policy / self.length


Views = Mapping[str, Likelihoods]

Measure = Literal["denoising error", "step log-density", "token log-probability", "score"]
"""What the numbers of a likelihood can be."""

LOG_LIKELIHOODS: frozenset[Measure] = frozenset(
    {"denoising error", "step log-density", "token log-probability"}
)
"""Measures of which a ratio of policy to reference has its meaning."""
TOKENS: frozenset[Measure] = frozenset({"token log-probability"})
"""For losses that want probabilities of tokens, or images under conditions."""


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns."""

    loss: Tensor
    """One value per example, shape [n]; the caller averages."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached figures for the log, each of shape [n] or a scalar."""


@dataclass(frozen=True, kw_only=True)
class AbstractObjective(Ranged, abc.ABC):
    """A loss over named views; its fields are the settings of a config.

    What it declares is a property here, and a ClassVar wherever no setting decides it.
    """

    @property
    @abc.abstractmethod
    def views(self) -> frozenset[str]:
        """Names of the views that a batch must offer; see `diffalign.views`."""

    @property
    @abc.abstractmethod
    def needs_reference(self) -> bool:
        """Whether `Likelihoods.reference` is read."""

    @property
    def takes_unpaired(self) -> bool:
        """Whether views may be of different samples (`Likelihoods.rows`), so that each row of a
        data set can hold a single response, desirable or not."""
        return False

    @property
    def must_know(self) -> Known:
        """What of `Likelihoods.totals` is read."""
        return "nothing"

    @property
    def takes_strength(self) -> frozenset[Part]:
        """Which parts of a pair's strength are read: fields of `Likelihoods`. A run whose data
        gives others is refused."""
        return frozenset()

    @property
    def needs_strength(self) -> frozenset[Part]:
        """Those of them without which there is no loss."""
        return frozenset()

    @property
    def needs_divergence(self) -> bool:
        """Whether `Likelihoods.divergence` is read."""
        return False

    @property
    def needs_measured(self) -> frozenset[Measured]:
        """Which further fields of `Likelihoods` are read."""
        return frozenset()

    @property
    def holds_fixed(self) -> frozenset[str]:
        """Inputs to which no gradient goes, on purpose: views by name for their likelihoods,
        `VIEW.divergence` and `VIEW.distance`. Sums over a step (`Likelihoods.totals`) never have
        one."""
        return frozenset()

    @property
    def reads(self) -> frozenset[Measure]:
        """The measures on which this loss has a meaning."""
        return LOG_LIKELIHOODS

    def own(self, views: Views) -> dict[str, Likelihoods]:
        """The views of a batch that it reads."""
        return {name: views[name] for name in sorted(self.views)}

    @abc.abstractmethod
    def __call__(self, views: Views) -> LossOutput:
        """One loss per example, and figures for the log."""

    def note(self) -> str:
        """What a user should know of the loss before a run, in one line; may be empty."""
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """What the loss remembers of earlier batches, for a checkpoint; nothing in most losses."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        assert not state, "a loss without a memory was given one"


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
