"""A method as a list of terms: the weighted sum of objectives, each over views of its choice.

mDPO, for example, prefers the chosen response to the rejected one, prefers it next to its image to
next to a crop of it, and holds its likelihood up:

    objective:
      kind: weighted_sum
      terms:
        - objective: {kind: dpo, beta: 0.1}
        - {objective: {kind: dpo, beta: 0.1}, views: {rejected: chosen@crop}}
        - objective: {kind: anchor, beta: 0.1}

A view that several terms read is evaluated once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from diffalign.objectives.base import (
    AbstractObjective,
    Known,
    Likelihoods,
    LossOutput,
    Measure,
    Measured,
    Part,
    Views,
)
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, exchanged_name, expected_loss
from diffalign.ranges import MoreThan, Ranged
from diffalign.views import View


@dataclass(frozen=True, kw_only=True)
class Term(Ranged):
    """One objective of a sum."""

    objective: AbstractObjective
    """What is wanted."""
    weight: Annotated[float, MoreThan(0, "leave the term out instead")] = 1.0
    """What its loss is multiplied by."""
    views: Mapping[str, str] = field(default_factory=dict)
    """Which views of the batch stand for the objective's own, by their names; those that are not
    listed stand for themselves."""
    name: str | None = None
    """What its figures are called; null takes the kind of the objective, numbered where it comes
    again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = ", ".join(sorted(self.objective.views))
        for known, meant in self.views.items():
            if known not in self.objective.views:
                raise ValueError(
                    f"views names {known}, and the objective {self.kind} compares {own}: write "
                    f"its own views on the left, and what represents them on the right"
                )
            View.parse(meant)
        if len(set(self.renamed.values())) < len(self.renamed):
            raise ValueError(
                f"two views of the objective {self.kind} ({own}) are both the same one "
                f"({', '.join(self.renamed[view] for view in sorted(self.renamed))}): there is "
                f"nothing to compare"
            )
        if self.name is not None and not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and underscores, got {self.name!r}")

    @property
    def kind(self) -> str:
        """The objective's kind."""
        return type(self.objective).__module__.rpartition(".")[2]

    @property
    def renamed(self) -> dict[str, str]:
        """The objective's views, and those of the batch that stand for them."""
        return {view: self.views.get(view, view) for view in self.objective.views}

    @property
    def sides(self) -> frozenset[str]:
        """Which of the two responses of a pair it reads, next to whatever images."""
        responses = {View.parse(meant).response for meant in self.renamed.values()}
        return frozenset(responses & CHOSEN_AND_REJECTED)

    @property
    def compares_sides(self) -> bool:
        """Whether it compares the chosen with the rejected side, which is what a pair's strength is
        about: not the chosen one with itself next to other images."""
        return self.sides == CHOSEN_AND_REJECTED

    def __call__(self, views: Views) -> LossOutput:
        """The objective's own loss, not yet weighted.

        A term of one side is the mean over both orders, too, where the batch has the other side: so
        of an undecided pair both responses are learnt.
        """
        own = {known: views[meant] for known, meant in self.renamed.items()}
        if self.compares_sides:
            return self.objective(self._turned(own))
        undecided = {name: _without_strength(view) for name, view in own.items()}
        if len(own) > 1 or self.objective.takes_strength:
            return self.objective(undecided)
        other = views.get(exchanged_name(*self.renamed.values()))
        if other is None:
            return expected_loss(undecided, self.objective)
        return expected_loss(own, self.objective, others=dict.fromkeys(own, other))

    def _turned(self, own: Views) -> Views:
        """The objective's views, whose strength is that of their own order."""
        chosen = own.get("chosen")
        if chosen is None or View.parse(self.renamed["chosen"]).response != "rejected":
            return own
        return {name: _reversed(view) for name, view in own.items()}


def _without_strength(view: Likelihoods) -> Likelihoods:
    return replace(view, preference=None, margin=None, target=None)


def _reversed(view: Likelihoods) -> Likelihoods:
    """Its strength as of the other order of the pair."""
    return replace(
        view,
        preference=None if view.preference is None else 1 - view.preference,
        margin=None if view.margin is None else -view.margin,
        target=None if view.target is None else -view.target,
    )


@dataclass(frozen=True, kw_only=True)
class WeightedSum(AbstractObjective):
    """The sum of the terms; it needs what any of them needs."""

    terms: tuple[Term, ...]
    """Any number of them; one loss per example each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms:
            raise ValueError("terms must name at least one objective")
        given = Counter(term.name for term in self.terms if term.name is not None)
        twice = [name for name, times in given.items() if times > 1]
        if twice:
            raise ValueError(f"two terms are called {twice[0]}: their names tell figures apart")
        if not self.reads:
            each = "; ".join(
                f"{name} has one for a {' or a '.join(sorted(term.objective.reads))}"
                for name, term in self.named.items()
            )
            raise ValueError(f"no likelihood has a meaning for all terms: {each}")

    @property
    def named(self) -> dict[str, Term]:
        """The terms by the names of their figures."""
        named = {term.name: term for term in self.terms if term.name is not None}
        result: dict[str, Term] = {}
        for term in self.terms:
            name, number = term.name or term.kind, 1
            while term.name is None and (name in named or name in result):
                number += 1
                name = f"{term.kind}_{number}"
            result[name] = term
        return result

    @property
    def views(self) -> frozenset[str]:
        """Every view that a term reads."""
        return frozenset(view for term in self.terms for view in term.renamed.values())

    @property
    def needs_reference(self) -> bool:
        """Whether any term does."""
        return any(term.objective.needs_reference for term in self.terms)

    @property
    def must_know(self) -> Known:
        """The most that any term must."""
        needs = {term.objective.must_know for term in self.terms}
        most = ("every_row", "log_ratios", "counts", "nothing")
        return next(known for known in most if known in needs)

    @property
    def needs_divergence(self) -> bool:
        """Whether any term does."""
        return any(term.objective.needs_divergence for term in self.terms)

    @property
    def needs_measured(self) -> frozenset[Measured]:
        """What any term does."""
        return frozenset().union(*(term.objective.needs_measured for term in self.terms))

    @property
    def holds_fixed(self) -> frozenset[str]:
        """What no term sends a gradient to."""
        moved: set[str] = set()
        held: set[str] = set()
        for term in self.terms:
            for view, meant in term.renamed.items():
                for part in ("", ".divergence", ".distance"):
                    fixed = f"{view}{part}" in term.objective.holds_fixed
                    (held if fixed else moved).add(f"{meant}{part}")
        return frozenset(held - moved)

    @property
    def reads(self) -> frozenset[Measure]:
        """What has a meaning for all terms."""
        return frozenset.intersection(*(term.objective.reads for term in self.terms))

    @property
    def takes_strength(self) -> frozenset[Part]:
        """What all terms read that compare the two sides of a pair; and advantages, which are of
        one response, where any term reads them."""
        taken = [term.objective.takes_strength for term in self.terms if term.compares_sides]
        compared = frozenset.intersection(*taken) if taken else frozenset()
        return compared | {
            part
            for term in self.terms
            for part in term.objective.takes_strength
            if part == "advantage"
        }

    @property
    def needs_strength(self) -> frozenset[Part]:
        """What any term needs."""
        return frozenset().union(*(term.objective.needs_strength for term in self.terms))

    def __call__(self, views: Views) -> LossOutput:
        outputs = {name: (term.weight, term(views)) for name, term in self.named.items()}
        loss = torch.stack([weight * output.loss for weight, output in outputs.values()]).sum(dim=0)
        metrics: dict[str, Tensor] = {}
        for name, (_, output) in outputs.items():
            own = {"loss": output.loss.detach(), **output.metrics}
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        return LossOutput(loss, metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """What the terms remember, under their names."""
        return {
            f"{name}/{key}": value
            for name, term in self.named.items()
            for key, value in term.objective.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give every term its own back."""
        for name, term in self.named.items():
            own = {
                k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")
            }
            term.objective.load_state_dict(own)

    def note(self) -> str:
        """The sum as a formula, and what its terms have to say."""
        formula = " + ".join(
            f"{f'{term.weight:g} ' if term.weight != 1 else ''}{name}"
            f"({', '.join(term.renamed[view] for view in sorted(term.renamed))})"
            for name, term in self.named.items()
        )
        notes = dict.fromkeys(term.objective.note() for term in self.terms)
        return "; ".join([formula, *(note for note in notes if note)])
