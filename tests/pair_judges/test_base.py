"""Both orders of a pair, and win rates, by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from diffalign.pair_judges.base import every_pair, in_both_orders, win_rates
from tests.pair_judges.leaning_judge import LeaningJudge


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level,) * 3)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_pair_is_shown_in_both_orders_and_its_preference_is_their_mean():
    judge = LeaningJudge(slope=2.0, lean=0.7)
    found = in_both_orders(judge, [grey(255)], [grey(0)], ["a"])
    forward, backward = sigmoid(2 + 0.7), sigmoid(-2 + 0.7)
    assert found.forward.tolist() == pytest.approx([forward], abs=1e-6)
    assert found.backward.tolist() == pytest.approx([backward], abs=1e-6)
    assert found.preference.tolist() == pytest.approx([(forward + 1 - backward) / 2], abs=1e-6)
    other = in_both_orders(judge, [grey(0)], [grey(255)], ["a"])
    assert other.preference.item() == pytest.approx(1 - found.preference.item(), abs=1e-6)


def test_images_that_are_alike_are_preferred_by_half_however_a_judge_leans():
    found = in_both_orders(LeaningJudge(lean=5.0), [grey(9)], [grey(9)], ["a"])
    assert found.preference.item() == pytest.approx(0.5, abs=1e-6)


def test_a_win_rate_is_the_mean_over_the_others():
    pairs = every_pair(3)
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    found = win_rates(3, pairs, [0.9, 0.6, 0.2])
    assert found == pytest.approx([0.75, 0.15, 0.6])  # (.1 + .2) / 2, (.4 + .8) / 2
    assert sum(found) == pytest.approx(1.5)
    assert win_rates(3, [(0, 2)], [1.0]) == [1.0, None, 0.0]


def test_a_judge_that_returns_another_number_of_verdicts_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Short(LeaningJudge):
        def prefers(self, first, second, prompts):
            return torch.ones(1)

    with pytest.raises(ValueError, match=r"must return 2 numbers, got shape \(1,\)"):
        in_both_orders(Short(), [grey(1)], [grey(2)], ["a"])
