"""What every objective takes and gives.

An objective sees one record of log-likelihoods per named view of the batch and returns one loss per
example. It does not know whether the numbers came from a denoiser or from tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign import world
from diffalign.ranges import Ranged

Known = Literal["nothing", "counts", "log_ratios", "every_row"]
"""What a loss must know of a whole optimiser step before it is computed for any part of it: no
more than its own rows; how many rows and tokens there are; the sum of the policy's log-ratios as
well; or every row by itself."""


Part = Literal["preference", "margin", "target", "weight", "advantage"]
"""What data can say of a pair besides its order, and rollouts of a response."""


Measured = Literal["distance", "embedding", "typicality", "tokens"]
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


@dataclass(frozen=True, kw_only=True)
class TokenLikelihoods:
    """Log-probabilities of the tokens of n responses, each by itself; [n, T], 0 where padded."""

    policy: Tensor
    """Under the model in training; carries gradient."""
    weights: Tensor
    """How much each token counts; 0 outside the response."""
    old: Tensor | None = None
    """Under the policy that sampled the responses; None where that is the one in training."""
    reference: Tensor | None = None
    """Under the fixed reference; None for objectives without one."""

    @property
    def log_ratio(self) -> Tensor:
        """Policy minus the one that sampled, [n, T]; 0 with the policy's gradient where they are
        the same."""
        return self.policy - (self.policy.detach() if self.old is None else self.old)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each response, [n]; 0 for one that has none.

        Args:
            values: [n, T], or [n, 1] for values of whole responses.
        """
        total = self.weights.sum(dim=1)
        return (values * self.weights).sum(dim=1) / torch.where(total > 0, total, 1)


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
    tokens: TokenLikelihoods | None = None
    """Each token by itself, for losses that clip or weigh them; None where none was kept."""
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
    """How much better each row did than what it was sampled next to, shape [n], of either sign;
    None where nobody says it."""

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
