"""Online preferences between responses: sampled responses are paired by what their rewards say.

With `offline_share` some questions give the pair of their data set instead, which is mixed DPO:
whether one does is sampled anew for each visit. With `pairs.kind: rejection` responses are accepted
as RSO accepts them. With `reference: latest` each round is compared with the policy that sampled
it. With win rates as the reward and a gap as a preference that is DNO, and with a gap as a target
online IPO.

Sources: Guo et al. 2024 (online DPO), arXiv:2402.04792; Xu et al. 2024 (iterations),
arXiv:2312.16682; Amirloo et al. 2024 (mixed DPO for vision-language models), arXiv:2407.02477;
Rosset et al. 2024 (DNO), arXiv:2404.03715; Zhou et al. 2025 (online IPO), arXiv:2503.08942.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch

from diffalign import components
from diffalign.data.responses.questions import Question
from diffalign.data.source import AbstractSource
from diffalign.objectives.advantages import weighted_sum
from diffalign.pair_rules.base import AbstractPairRule, ScoredGroup, uniforms
from diffalign.pair_rules.best_worst import BestWorst
from diffalign.ranges import Between
from diffalign.rollouts.base import RunContext
from diffalign.rollouts.pairing import Temperature, preference_of
from diffalign.rollouts.response_collector import ResponseCollector
from diffalign.rollouts.response_rounds import AbstractResponseRollouts, Row, Rows, ScoredResponses
from diffalign.rollouts.rounds import Rounds
from diffalign.seeding import unit_interval


@dataclass(frozen=True, kw_only=True)
class ResponsePairs(AbstractResponseRollouts):
    """Rounds of pairs of responses."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    pairs: AbstractPairRule = field(default_factory=BestWorst)
    """Which responses to a question are paired, by the weighted sum of their rewards."""
    gap_temperature: Temperature = None
    """Take a pair's preference as sigmoid(gap / gap_temperature) of the rewards, and not as
    certain. Null is certain."""
    targets: bool = False
    """Give each pair the gap of its rewards as its target, which `margin_regression` regresses: of
    win rates as in online IPO, of other rewards as in REBEL."""
    offline_share: Annotated[float, Between(0, 1)] = 0.0
    """Probability that a visit takes the chosen and the rejected response of the data set in place
    of sampled ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_no_comparison()
        if self.targets and self.gap_temperature is not None:
            raise ValueError(
                "targets and gap_temperature are both given, and no loss reads a target and a "
                "preference: leave one of them out"
            )
        if self.targets and self.offline_share:
            raise ValueError(
                "offline_share takes pairs of the data, of which no reward gives a target: leave "
                "out either that or targets"
            )
        if self.pairs.needs_labels:
            raise ValueError(
                f"pairs is {components.kind_of(self.pairs)}, which people's labels choose, and "
                f"sampled responses have none: take best_worst, above_gap or rejection"
            )

    @property
    def strength(self) -> Mapping[str, str]:
        if self.targets:
            return {"target": "targets is true"}
        if self.gap_temperature is None:
            return {}
        return {"preference": f"gap_temperature is {self.gap_temperature:g}"}

    def open(self, run: RunContext) -> AbstractSource:
        return Rounds(self, ResponseCollector(self, run), run)

    def describe(self) -> str:
        offline = f", {self.offline_share:.0%} of the data's own pairs" * bool(self.offline_share)
        return f"{super().describe()}, paired by {components.kind_of(self.pairs)}{offline}"

    def samples_at(self, seed: int) -> int:
        offline = unit_interval(seed, "offline") < self.offline_share
        return 0 if offline else self.responses_per_question

    def data_responses_at(self, seed: int) -> tuple[str, ...]:
        return () if self.samples_at(seed) else ("chosen", "rejected")

    def obstacle(self, question: Question) -> str | None:
        if not self.offline_share or (question.response and question.rejected):
            return None
        return "it has no chosen and rejected response, which offline_share takes"

    def rows(self, groups: Sequence[ScoredResponses], seed: int) -> Rows:
        rows: list[Row] = []
        undecided = offline = 0
        gaps: list[float] = []
        for group in groups:
            if not group.texts:
                offline += 1
                certain = None if self.gap_temperature is None else 1.0
                own = dict.fromkeys(("chosen", "rejected"))
                rows.append(
                    Row(
                        sample_id=f"{group.question_id}/offline",
                        visit=group.visit,
                        responses=own,
                        preference=certain,
                    )
                )
                continue
            made, found = self._pairs(group, seed)
            undecided += not made
            rows += made
            gaps += found
        figures = {"pairs": float(len(rows)), "offline": float(offline)}
        if gaps:
            figures["gap"] = sum(gaps) / len(gaps)
        sampled = len(groups) - offline
        said = f"{sampled - undecided} of {sampled} questions with differing rewards"
        return Rows(
            rows=rows,
            figures=figures,
            skipped={"questions of whose responses no two can be paired": undecided},
            sentence=said + (f", {offline} with the pair of the data" if offline else ""),
        )

    def _pairs(self, group: ScoredResponses, seed: int) -> tuple[list[Row], list[float]]:
        """The pairs of one question, and their gaps."""
        names = self.reward_names
        rewards = torch.tensor(group.vector(names), dtype=torch.float64)[:, None]
        scores = weighted_sum(rewards, self.weights)[0].tolist()
        there = [place for place, score in enumerate(scores) if score == score]
        if len(there) < 2:
            return [], []
        scored = ScoredGroup(
            prompt=group.question,
            scores=tuple(scores[place] for place in there),
            by_scorer={
                name: tuple(float(group.rewards[name][place] or 0) for place in there)
                for name in names
            },
        )
        pairs = self.pairs.pairs(scored, uniforms(seed, group.visit))
        gaps = [scored.gap(pair) for pair in pairs]
        return [
            Row(
                sample_id=f"{group.question_id}/{there[better]}-over-{there[worse]}",
                visit=group.visit,
                responses={"chosen": there[better], "rejected": there[worse]},
                preference=preference_of(gap, self.gap_temperature),
                target=gap if self.targets else None,
            )
            for (better, worse), gap in zip(pairs, gaps, strict=True)
        ], gaps
