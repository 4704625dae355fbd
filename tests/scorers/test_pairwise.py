"""A pair judge as a scorer of images that are scored together."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.likelihoods.scores import Scores
from diffalign.rollouts.seppo import SemiPolicy
from diffalign.scorers.combined import Combined, Part
from diffalign.scorers.pairwise import Pairwise
from tests.pair_judges.leaning_judge import LeaningJudge


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8)


def test_images_are_held_against_those_of_their_prompt_alone():
    scorer = Pairwise(judge=LeaningJudge(slope=4.0, lean=1.0))
    found = scorer.score(levels(-1.0, 1.0, -0.2, 1.0, 0.6), ["a", "b", "a", "b", "alone"])
    assert found[:4].tolist() == pytest.approx(
        [1 - found[2].item(), 0.5, found[2].item(), 0.5], abs=1e-6
    )
    assert found[2] > 0.6 and math.isnan(found[4])


def test_three_images_have_the_mean_of_their_two_pairs():
    scorer = Pairwise(judge=LeaningJudge(slope=2.0))
    three = scorer.score(levels(-1.0, 0.0, 1.0), ["a"] * 3)
    two = [scorer.score(levels(*pair), ["a"] * 2)[0].item() for pair in ((-1.0, 0.0), (-1.0, 1.0))]
    assert three[0].item() == pytest.approx(sum(two) / 2, abs=1e-6)
    assert three.sum().item() == pytest.approx(1.5, abs=1e-6)


def test_who_scores_images_one_by_one_refuses_it():
    scorer = Pairwise(judge=LeaningJudge())
    with pytest.raises(ValueError, match="rollouts seppo scores every image by itself"):
        SemiPolicy(scorers=(scorer,))
    with pytest.raises(ValueError, match=r"parts\.a: a sum scores every image by itself"):
        Combined(parts={"a": Part(scorer=scorer)})
    with pytest.raises(ValueError, match=r"likelihood\.relabel scores every image by itself"):
        Scores(relabel=scorer)
