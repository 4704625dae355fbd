"""From win rates to losses: SPPO, DNO and online IPO through the rows of a round.

Values are those of uclaml/SPPO and of the papers' formulas; see tests/objectives/test_self_play.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

from diffalign.data.responses.questions import Question
from diffalign.objectives.advantage_regression import AdvantageRegression
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.margin_regression import MarginRegression
from diffalign.pair_rules.above_gap import AboveGap
from diffalign.rewards.base import AbstractWinRate, Match
from diffalign.rewards.win_rate import WinRate
from diffalign.rollouts.response_advantages import ResponseAdvantages
from diffalign.rollouts.response_pairs import ResponsePairs
from diffalign.rollouts.response_rounds import ScoredResponses
from tests.objectives.responses import numbers, responses
from tests.objectives.test_self_play import LOGITS, OF_REFERENCE, PREFERRED
from tests.rollouts.letters import Vowels
from tests.rollouts.test_response_rounds import groups, of_round, rollouts, rows, start


@dataclass(frozen=True, kw_only=True)
class Known(AbstractWinRate):
    """Of four responses a, b, c and d, the published probabilities; of two, that of the first."""

    first: float | None = None

    def preferences(self, question: Question, responses: Sequence[str]) -> Mapping[Match, float]:
        if self.first is not None:
            return {(0, 1): self.first}
        return {(i, j): PREFERRED[i, j].item() for i in range(4) for j in range(i + 1, 4)}


def group(rates, name="known", visit=0) -> ScoredResponses:
    return ScoredResponses(
        visit=visit,
        question_id="q",
        question="",
        texts=tuple("abcd"[: len(rates)]),
        rewards={name: tuple(rates)},
    )


def reading(folder, kind, rates, **changes):
    """What a round with these win rates of its questions trains on."""
    settings = rollouts(folder, kind, responses_per_question=len(rates[0]), **changes)
    (name,) = settings.reward_names
    return settings.rows([group(each, name, i) for i, each in enumerate(rates)], seed=0).rows


def test_sppo_is_the_regression_of_every_response_on_its_win_rate(tmp_path):
    rates = [Known(first=p).score(None, ["a", "b"]) for p in (0.8, 0.6, 0.9)]
    made = reading(tmp_path, ResponseAdvantages, rates, scale="none", reference="latest")
    views = responses()
    sides = {0: views["chosen"], 1: views["rejected"]}
    losses = []
    for row in made:
        side = sides[row.responses["sampled"]]
        view = Likelihoods(
            side.policy[row.visit, None],
            side.reference[row.visit, None],
            advantage=numbers([row.advantage]),
        )
        loss = AdvantageRegression(beta=0.5, divided_by_beta=True)({"sampled": view})
        losses.append(loss.loss.item())
    pairs = torch.tensor(losses).view(3, 2).mean(dim=1)
    assert pairs.tolist() == pytest.approx([0.02, 0.17, 0.245], abs=1e-7)


def test_among_four_responses_sppo_rests_at_the_published_targets(tmp_path):
    rates = Known().score(None, list("abcd"))
    made = reading(tmp_path, ResponseAdvantages, [rates], scale="none")
    targets = [0.533333333333, -0.133333333333, -0.166666666667, -0.233333333333]
    assert [row.advantage / 0.5 for row in made] == pytest.approx(targets, abs=1e-11)
    ratio = numbers(targets).requires_grad_()
    advantage = numbers([row.advantage for row in made])
    view = Likelihoods(ratio + 0.1, torch.zeros(4).double(), advantage=advantage)
    loss = AdvantageRegression(beta=0.5, divided_by_beta=True)({"sampled": view}).loss
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.01] * 4, abs=1e-11)
    assert ratio.grad.tolist() == pytest.approx([0.2] * 4, abs=1e-11)


def log_ratios(made) -> dict[str, torch.Tensor]:
    ratios = LOGITS.log_softmax(dim=0) - OF_REFERENCE.log_softmax(dim=0)
    sides = ("chosen", "rejected")
    return {side: ratios[[row.responses[side] for row in made]] for side in sides}


def test_dno_is_dpo_with_the_gap_of_win_rates_as_a_preference(tmp_path):
    rates = [0.717168113354, 0.438877852361, 0.427651932353, 0.425494790734]
    every = AboveGap(most=6)
    made = reading(tmp_path, ResponsePairs, [rates], pairs=every, gap_temperature=1.0)
    views = {
        side: Likelihoods(
            ratios,
            torch.zeros(6).double(),
            preference=numbers([row.preference for row in made]),
        )
        for side, ratios in log_ratios(made).items()
    }
    losses = dict(
        zip(
            [tuple(row.responses.values()) for row in made],
            DPO(beta=0.5)(views).loss.tolist(),
            strict=True,
        )
    )
    published = {(0, 1): 0.683826326086, (0, 2): 0.699240966970, (0, 3): 0.684052956171}
    published |= {(1, 2): 0.714137832612, (1, 3): 0.693599212167, (2, 3): 0.720832927403}
    assert losses == pytest.approx(published, abs=1e-11)


def test_online_ipo_regresses_margins_on_the_gap_of_win_rates(tmp_path):
    rates = [(0.8, 0.3), (0.55, 0.5), (0.9, 0.2)]
    made = reading(tmp_path, ResponsePairs, rates, targets=True)
    assert [row.responses for row in made] == [{"chosen": 0, "rejected": 1}] * 3
    target = numbers([row.target for row in made])
    views = {
        side: Likelihoods(view.policy, view.reference, target=target)
        for side, view in responses().items()
        if side in ("chosen", "rejected")
    }
    loss = MarginRegression(beta=0.5, divided_by_beta=True)(views).loss
    assert loss.tolist() == pytest.approx([0.0, 0.25, 0.25], abs=1e-11)


def test_a_round_writes_rates_and_its_batches_have_the_targets(tmp_path):
    rate = WinRate(reward=Vowels(), temperature=0.2)
    settings = rollouts(tmp_path, ResponsePairs, rewards=(rate,), targets=True)
    source = start(settings, tmp_path)
    batches = of_round(source, tmp_path)
    known = {each["visit"]: each["rewards"]["win_rate"] for each in groups(tmp_path)}
    for rates in known.values():
        there = [rate for rate in rates if rate is not None]
        assert sum(there) / len(there) == pytest.approx(0.5)
    made = {row["sample_id"]: row for row in rows(tmp_path)}
    for batch in batches:
        (name,) = batch.sample_ids
        places = made[name]["responses"]
        gap = known[made[name]["visit"]][places["chosen"]]
        gap -= known[made[name]["visit"]][places["rejected"]]
        assert batch.strength["target"].item() == pytest.approx(gap) and gap > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap_temperature": 1.0}, "no loss reads a target and a preference"),
        ({"offline_share": 0.5}, "of which no reward gives a target"),
    ],
)
def test_targets_that_nothing_can_read_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        rollouts(tmp_path, ResponsePairs, targets=True, **change)
