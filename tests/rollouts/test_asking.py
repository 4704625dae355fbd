from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from diffalign.errors import DataError
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.rollouts.asking import ask, scorer_name
from diffalign.scorers.base import AbstractScorer
from tests.evaluation.brightness import Brightness

PICTURES = torch.stack([torch.full((3, 8, 8), level) for level in (-1.0, 0.0, 1.0)])
PROMPTS = ["night", "dusk", "noon"]


@dataclass(frozen=True, kw_only=True)
class Recorder(AbstractScorer):
    """Answers with the times it was given."""

    takes_time: ClassVar[bool] = True
    shape: tuple[int, ...] = (3,)

    @property
    def fingerprint(self) -> str:
        return "recorder"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None and not torch.is_grad_enabled()
        return t.float().requires_grad_().expand(self.shape)


def test_a_scorer_that_takes_the_time_is_told_it():
    assert ask(Recorder(), PICTURES, PROMPTS, 501).tolist() == [501, 501, 501]


def test_a_plain_scorer_is_not():
    assert ask(Brightness(), PICTURES, PROMPTS, 501).tolist() == [0, 0.5, 1]
    assert ask(PlaygroundOracle(), PICTURES, ["a red circle"] * 3, 501).tolist() == [0, 0, 0]


def test_an_answer_that_is_not_finite_is_not_a_number():
    scores = ask(Brightness(), PICTURES, ["night", "nan", "noon"], 0)
    assert scores.isnan().tolist() == [False, True, False]
    scores = ask(Brightness(scale=float("inf")), PICTURES + 1, PROMPTS, 0)
    assert scores.isnan().all()


def test_a_picture_that_is_not_finite_is_never_shown():
    broken = PICTURES.clone()
    broken[1, 0, 3, 3] = float("nan")
    assert ask(Recorder(), broken, PROMPTS, 7).isnan().tolist() == [False, True, False]


def test_a_refusal_names_the_scorer():
    with pytest.raises(DataError, match=r"scorer brightness refuses .* cannot be judged"):
        ask(Brightness(), PICTURES, ["raise"] * 3, 0)


def test_another_number_of_scores_is_refused():
    with pytest.raises(DataError, match=r"must give 3 images as many scores, .* shape \(1, 3\)"):
        ask(Recorder(shape=(1, 3)), PICTURES, PROMPTS, 0)


def test_scorers_are_called_by_the_last_part_of_their_kind():
    assert scorer_name(Brightness()) == "brightness"
