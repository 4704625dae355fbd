from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign import config
from diffalign.errors import DataError
from diffalign.files import read_json_lines, write_json_lines
from diffalign.jobs import score
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.combined import Combined, Part, moments_of
from diffalign.scorers.images import AbstractImageScorer
from tests.jobs.folders import fill


@dataclass(frozen=True, kw_only=True)
class Channel(AbstractImageScorer):
    """Level of one colour of the first pixel; NaN for the level 13."""

    place: int

    @property
    def fingerprint(self) -> str:
        return f"channel-{self.place}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        levels = [float(image.getpixel((0, 0))[self.place]) for image in images]
        return torch.tensor([torch.nan if level == 13 else level for level in levels])


def colours(*levels: tuple[int, int, int]) -> Tensor:
    values = torch.tensor(levels, dtype=torch.float32) / 127.5 - 1
    return values.view(-1, 3, 1, 1).expand(-1, 3, 4, 4).clone()


IMAGES = colours((10, 200, 0), (30, 100, 0))


def total(images: Tensor = IMAGES, **parts: Part) -> list[float]:
    return Combined(parts=parts).score(images, ["a"] * len(images)).tolist()


def test_a_sum_worked_by_hand():
    red, green = Part(scorer=Channel(place=0), weight=2.0), Part(scorer=Channel(place=1))
    assert total(red=red, green=green) == [2 * 10 + 200, 2 * 30 + 100]
    low = Part(scorer=Channel(place=1), weight=-1.0)
    assert total(red=red, green=low) == [20 - 200, 60 - 100]
    scaled = Part(scorer=Channel(place=0), weight=0.5, mean=20.0, deviation=5.0)
    assert total(red=scaled, green=low) == [0.5 * -2 - 200, 0.5 * 2 - 100]


def rows(fingerprint: str, *scores: float):
    return [
        {"image": f"{i}", "prompt": "a", "fingerprint": fingerprint, "score": value}
        for i, value in enumerate(scores)
    ]


def test_moments_are_those_of_a_file_of_scores(tmp_path):
    file = tmp_path / "red.jsonl"
    write_json_lines(file, rows("channel-0", 1.0, 3.0, 8.0))
    # Mean 4; squares 9, 1, 16 over 3.
    assert moments_of(file, Channel(place=0)) == pytest.approx((4.0, (26 / 3) ** 0.5))
    part = Part(scorer=Channel(place=0), moments=file)
    assert total(red=part) == pytest.approx([6 / (26 / 3) ** 0.5, 26 / (26 / 3) ** 0.5])
    same = Part(scorer=Channel(place=0), mean=4.0, deviation=(26 / 3) ** 0.5)
    assert Combined(parts={"a": part}).fingerprint == Combined(parts={"a": same}).fingerprint


def test_the_columns_that_score_writes_are_such_files(tmp_path):
    fill(tmp_path, {("base", "a", 0): 0, ("base", "b", 0): 51, ("base", "c", 0): 255})
    kind = "tests.comparison.brightness"
    score.run(config.load(score.ScoreConfig, None, [f"images={tmp_path}", f"scorer.kind={kind}"]))
    file = tmp_path / "scores" / "brightness.jsonl"
    overrides = [f"images={tmp_path}", "scorer.kind=combined"]
    overrides += [f"scorer.parts.light.scorer.kind={kind}", f"scorer.parts.light.moments={file}"]
    score.run(config.load(score.ScoreConfig, None, overrides))
    found = [row["score"] for row in read_json_lines(tmp_path / "scores" / "combined.jsonl")]
    assert sum(found) == pytest.approx(0, abs=1e-6)
    assert sum(value**2 for value in found) == pytest.approx(3, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows("channel-1", 1.0, 2.0), r"scores by channel-1, and .* is channel-0"),
        (rows("channel-0", 1.0), "1 scores by .* that do not differ"),
        (rows("channel-0", 2.0, 2.0), "2 scores by .* that do not differ"),
        ([{"image": "x"}], "is no file of scores"),
    ],
)
def test_files_of_other_scorers_or_without_a_spread_are_refused(tmp_path, content, message):
    file = tmp_path / "x.jsonl"
    write_json_lines(file, content)
    with pytest.raises(DataError, match=message):
        total(red=Part(scorer=Channel(place=0), moments=file))


def test_what_one_part_cannot_score_has_no_sum():
    parts = {"red": Part(scorer=Channel(place=0)), "green": Part(scorer=Channel(place=1))}
    scores = Combined(parts=parts).score(colours((13, 1, 1), (1, 13, 1), (1, 2, 3)), ["a"] * 3)
    assert scores.isnan().tolist() == [True, True, False] and scores[2] == 3


def test_weight_moments_and_scorers_are_the_fingerprint_and_their_order_is_not():
    red, green = Part(scorer=Channel(place=0)), Part(scorer=Channel(place=1))
    one = Combined(parts={"red": red, "green": green}).fingerprint
    assert Combined(parts={"green": green, "red": red}).fingerprint == one
    others = [
        Part(scorer=Channel(place=0), weight=2.0),
        Part(scorer=Channel(place=2)),
        Part(scorer=Channel(place=0), mean=0.0, deviation=2.0),
    ]
    found = {Combined(parts={"red": part, "green": green}).fingerprint for part in others}
    assert len(found | {one}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "a number other than 0"),
        ({"mean": 1.0}, "give both, or none"),
        ({"deviation": 1.0}, "give both, or none"),
        ({"mean": 1.0, "deviation": 0.0}, "greater than 0"),
        ({"mean": 1.0, "deviation": 1.0, "moments": "x"}, "give the file, or the two"),
    ],
)
def test_senseless_parts_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Part(scorer=Channel(place=0), **settings)


def test_scorers_of_noise_and_timesteps_are_refused():
    class Noisy(Channel):
        takes_time = True

    with pytest.raises(ValueError, match=r"parts\.noisy is .* at a timestep"):
        Combined(parts={"noisy": Part(scorer=Noisy(place=0))})
    with pytest.raises(ValueError, match="parts is empty"):
        Combined(parts={})
    with pytest.raises(ValueError, match="leave out t"):
        Combined(parts={"red": Part(scorer=Channel(place=0))}).score(
            IMAGES, ["a"] * 2, torch.zeros(2)
        )


def test_weights_of_every_part_are_moved():
    moved = []

    @dataclass(frozen=True, kw_only=True)
    class Moving(Channel):
        def to(self, device: torch.device | str) -> AbstractScorer:
            moved.append((self.place, str(device)))
            return self

    parts = {str(i): Part(scorer=Moving(place=i)) for i in range(2)}
    Combined(parts=parts).to("meta")
    assert moved == [(0, "meta"), (1, "meta")]
