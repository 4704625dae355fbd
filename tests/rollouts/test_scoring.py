from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DataError
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.rollouts.scoring import (
    ScoredImage,
    Scorers,
    ask,
    component_name,
    refuse_scorers_of_noise,
)
from diffalign.scorers.base import AbstractScorer
from tests.comparison.brightness import Brightness

CPU = torch.device("cpu")
IMAGES = torch.stack([torch.full((3, 8, 8), level) for level in (-1.0, 0.0, 1.0)])
PROMPTS = ["night", "dusk", "noon"]


@dataclass(frozen=True, kw_only=True)
class Recorder(AbstractScorer):
    """Responses with the times it was given."""

    takes_time: ClassVar[bool] = True
    shape: tuple[int, ...] = (3,)

    @property
    def fingerprint(self) -> str:
        return "recorder"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None and not torch.is_grad_enabled()
        return t.float().requires_grad_().expand(self.shape)


def paint(folder: Path, name: str, level: int) -> Path:
    path = folder / name
    Image.new("RGB", (8, 8), (level,) * 3).save(path)
    return path


def image(number: int, **scores: float | None) -> ScoredImage:
    return ScoredImage(0, "a cat", number, f"{number}.png", scores)


def test_every_scorer_sees_every_image_that_is_there(tmp_path):
    files = [paint(tmp_path, "a.png", 255), tmp_path / "absent.png", paint(tmp_path, "b.png", 51)]
    scorers = Scorers([Brightness(), Brightness(scale=-2.0)])
    scores = scorers.score_images(files, ["x", "y", "z"], CPU)
    assert scorers.names == ["brightness", "brightness_2"]
    assert scores[0] == pytest.approx({"brightness": 1.0, "brightness_2": -2.0})
    assert scores[1] == {}
    assert scores[2] == pytest.approx({"brightness": 0.2, "brightness_2": -0.4})


def test_a_score_that_is_not_finite_is_none(tmp_path):
    files = [paint(tmp_path, "a.png", 255), paint(tmp_path, "b.png", 255)]
    assert Scorers([Brightness()]).score_images(files, ["nan", "x"], CPU) == [
        {"brightness": None},
        {"brightness": pytest.approx(1.0)},
    ]


def test_nothing_is_asked_where_there_is_no_image(tmp_path):
    assert Scorers([Brightness()]).score_images([tmp_path / "a.png"], ["raise"], CPU) == [{}]


def test_a_scorer_that_refuses_is_named(tmp_path):
    file = paint(tmp_path, "a.png", 255)
    with pytest.raises(DataError, match=r"scorer oracle refuses.*'a cat' is not a playground"):
        Scorers([PlaygroundOracle()]).score_images([file], ["a cat"], CPU)


def test_scores_count_only_where_all_are_there():
    assert image(0, bright=1.0, sharp=2.0).vector() == [1.0, 2.0]
    assert image(0, bright=1.0, sharp=None).vector() is None
    assert image(0).vector() is None


def test_a_scorer_without_a_single_score_is_refused(tmp_path):
    scorers = Scorers([Brightness()])
    scorers.refuse_silence([image(0, brightness=None), image(1, brightness=0.0)], tmp_path)
    with pytest.raises(DataError, match="scorer brightness gave none of the round's 2 images"):
        scorers.refuse_silence([image(0, brightness=None), image(1, brightness=None)], tmp_path)
    with pytest.raises(DataError, match="the policy sampled no image that holds finite values"):
        scorers.refuse_silence([image(0), image(1)], tmp_path)


def test_a_scorer_that_takes_the_time_is_told_it():
    assert ask(Recorder(), IMAGES, PROMPTS, 501).tolist() == [501, 501, 501]


def test_a_plain_scorer_is_not():
    assert ask(Brightness(), IMAGES, PROMPTS, 501).tolist() == [0, 0.5, 1]
    assert ask(PlaygroundOracle(), IMAGES, ["a red circle"] * 3, 501).tolist() == [0, 0, 0]


def test_an_response_that_is_not_finite_is_not_a_number():
    scores = ask(Brightness(), IMAGES, ["night", "nan", "noon"], 0)
    assert scores.isnan().tolist() == [False, True, False]
    scores = ask(Brightness(scale=float("inf")), IMAGES + 1, PROMPTS, 0)
    assert scores.isnan().all()


def test_a_image_that_is_not_finite_is_never_shown():
    broken = IMAGES.clone()
    broken[1, 0, 3, 3] = float("nan")
    assert ask(Recorder(), broken, PROMPTS, 7).isnan().tolist() == [False, True, False]


def test_a_refusal_names_the_scorer():
    with pytest.raises(DataError, match=r"scorer brightness refuses .* cannot be scored"):
        ask(Brightness(), IMAGES, ["raise"] * 3, 0)


def test_another_number_of_scores_is_refused():
    with pytest.raises(DataError, match=r"must give 3 images as many scores, .* shape \(1, 3\)"):
        ask(Recorder(shape=(1, 3)), IMAGES, PROMPTS, 0)


def test_scorers_are_called_by_the_last_part_of_their_kind():
    assert component_name(Brightness()) == "brightness"


def test_scorers_of_noise_are_refused_where_images_are_finished():
    refuse_scorers_of_noise([Brightness()])
    with pytest.raises(ValueError, match=r"test_scoring, which scores noisy images at a timestep"):
        refuse_scorers_of_noise([Brightness(), Recorder()])


def test_without_scorers_nothing_has_a_score(tmp_path):
    assert Scorers([]).score_images([paint(tmp_path, "a.png", 255)], ["x"], CPU) == [{}]
