"""What every objective takes and gives.

An objective sees one record of log-likelihoods per named view of the batch and returns one loss per
example. It does not know whether the numbers came from a denoiser or from tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffalign import world
from diffalign.ranges import MoreThan, Ranged

Known = Literal["nothing", "counts", "log_ratios"]
"""What a loss must know of a whole optimiser step before it is computed for any part of it: no
more than its own rows; how many rows and tokens there are; or the policy's log-ratios as well."""


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

    @classmethod
    def of(cls, parts: Sequence[Likelihoods], *, step: int = -1) -> StepTotals:
        """Add up the parts of a view that this rank has, and those of the other ranks.

        Args:
            parts: of every micro-batch, on one device.
            step: number of the optimiser step.
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
        return cls(step, *world.total(figures))


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
    rows: Tensor | None = None
    """Which samples of the batch the rows are, int64 [n], where each sample has one view; n may
    then be 0. None where row i of every view is sample i."""
    whole_step: StepTotals | None = None
    """Of the optimiser step that the rows are part of; None where they are all of it."""

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
    def takes_ties(self) -> bool:
        """Whether `Likelihoods.weight` is read, so that a tie can be half a preference for either
        side and pairs can count differently."""
        return False

    @property
    def needs_divergence(self) -> bool:
        """Whether `Likelihoods.divergence` is read."""
        return False

    @property
    def needs_distance(self) -> bool:
        """Whether `Likelihoods.distance` is read."""
        return False

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


def pair_metrics(chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """The figures every pairwise objective reports, detached.

    Args:
        chosen_reward: beta times log-ratio of the preferred side, shape [n].
        rejected_reward: the same for the other side, shape [n].

    Returns:
        `accuracy` counts a zero margin as one half: the policy has no opinion yet, and neither 0
        nor 1 at the first step would say so.
    """
    chosen, rejected = chosen_reward.detach(), rejected_reward.detach()
    margin = chosen - rejected
    return {
        "accuracy": (margin.sign() + 1) / 2,
        "margin": margin,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


CHOSEN_AND_REJECTED = frozenset({"chosen", "rejected"})

Beta = Annotated[float, MoreThan(0, "at 0 nothing is learnt")]


@dataclass(frozen=True, kw_only=True)
class AbstractPairObjective(AbstractObjective):
    """A loss over one chosen and one rejected view: `pair_loss` is all that it has to say.

    Accuracy, margin and rewards are logged for every one of them.
    """

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""

    @abc.abstractmethod
    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        """One loss per pair, [n], and what should be logged with the rewards."""

    def score(self, view: Likelihoods) -> Tensor:
        """What is compared of the two sides, [n]: the log-ratio, unless there is no reference."""
        return view.log_ratio

    def reward(self, view: Likelihoods) -> Tensor:
        """Beta times the score, [n]; what accuracy, margin and rewards are of."""
        return self.beta * self.score(view)

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"], views["rejected"]
        output = self.pair_loss(chosen, rejected)
        rewards = pair_metrics(self.reward(chosen), self.reward(rejected))
        return LossOutput(output.loss, {**rewards, **output.metrics})
