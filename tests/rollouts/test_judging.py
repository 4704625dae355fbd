from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.errors import DataError
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.rollouts.judging import JudgedImage, Judges
from tests.evaluation.brightness import Brightness

CPU = torch.device("cpu")


def paint(folder: Path, name: str, level: int) -> Path:
    path = folder / name
    Image.new("RGB", (8, 8), (level,) * 3).save(path)
    return path


def image(number: int, **scores: float | None) -> JudgedImage:
    return JudgedImage(0, "a cat", number, f"{number}.png", scores)


def test_every_judge_sees_every_picture_that_is_there(tmp_path):
    files = [paint(tmp_path, "a.png", 255), tmp_path / "absent.png", paint(tmp_path, "b.png", 51)]
    judges = Judges([Brightness(), Brightness(scale=-2.0)])
    scores = judges.judge(files, ["x", "y", "z"], CPU)
    assert judges.names == ["brightness", "brightness_2"]
    assert scores[0] == pytest.approx({"brightness": 1.0, "brightness_2": -2.0})
    assert scores[1] == {}
    assert scores[2] == pytest.approx({"brightness": 0.2, "brightness_2": -0.4})


def test_a_score_that_is_not_finite_is_none(tmp_path):
    files = [paint(tmp_path, "a.png", 255), paint(tmp_path, "b.png", 255)]
    assert Judges([Brightness()]).judge(files, ["nan", "x"], CPU) == [
        {"brightness": None},
        {"brightness": pytest.approx(1.0)},
    ]


def test_nothing_is_asked_where_there_is_no_picture(tmp_path):
    assert Judges([Brightness()]).judge([tmp_path / "a.png"], ["raise"], CPU) == [{}]


def test_a_judge_that_refuses_is_named(tmp_path):
    file = paint(tmp_path, "a.png", 255)
    with pytest.raises(DataError, match=r"scorer oracle refuses.*'a cat' is not a playground"):
        Judges([PlaygroundOracle()]).judge([file], ["a cat"], CPU)


def test_scores_count_only_where_all_are_there():
    assert image(0, bright=1.0, sharp=2.0).vector() == [1.0, 2.0]
    assert image(0, bright=1.0, sharp=None).vector() is None
    assert image(0).vector() is None


def test_a_judge_without_a_single_score_is_refused(tmp_path):
    judges = Judges([Brightness()])
    judges.refuse_silence([image(0, brightness=None), image(1, brightness=0.0)], tmp_path)
    with pytest.raises(DataError, match="scorer brightness gave none of the round's 2 images"):
        judges.refuse_silence([image(0, brightness=None), image(1, brightness=None)], tmp_path)
    with pytest.raises(DataError, match="the policy drew no image that holds finite values"):
        judges.refuse_silence([image(0), image(1)], tmp_path)
