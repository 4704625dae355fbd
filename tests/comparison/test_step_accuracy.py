from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from diffalign.comparison.step_accuracy import accuracy_by_timestep, decided_pairs
from diffalign.data.pairs.config import PairConfig
from diffalign.models.diffusion.sd15 import SD15
from diffalign.scorers.base import AbstractScorer
from tests import layouts

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Brightness(AbstractScorer):
    """Prefers the brighter image, and forgets to where it is told the time."""

    takes_time = False
    fingerprint = "brightness"

    def score(self, images, prompts, t=None):
        assert t is None
        return images.mean(dim=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Clock(AbstractScorer):
    """Is right about the first side of every pair at early times and wrong at late ones."""

    takes_time = True
    fingerprint = "clock"

    def score(self, images, prompts, t=None):
        first = torch.arange(len(images)) < len(images) // 2
        return torch.where(t < 500, first.float(), -first.float())


@pytest.fixture(scope="module")
def model(tiny_sd15):
    settings = SD15(path=str(tiny_sd15))
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="none")


def bright_against_dark(make_pairs):
    batch = make_pairs("a", "b", "c")
    batch.images["chosen"].clamp_(min=0.5)
    batch.images["rejected"].clamp_(max=-0.5)
    return batch


def test_each_scorer_is_told_the_time_if_it_takes_it(model, make_pairs):
    found = accuracy_by_timestep(
        {"clock": Clock(), "brightness": Brightness()},
        model,
        [make_pairs("a", "b", "c"), make_pairs("d")],
        guidance=1.0,
        timesteps=(1, 951),
    )
    assert list(found["clock"][1].values()) == [1, 1, 1, 1]
    assert list(found["clock"][951].values()) == [0, 0, 0, 0]
    assert found["brightness"].keys() == {1, 951}


def test_timestep_zero_means_the_clean_images(model, make_pairs):
    found = accuracy_by_timestep(
        {"brightness": Brightness()},
        model,
        [bright_against_dark(make_pairs)],
        guidance=1.0,
        timesteps=(0,),
    )
    assert list(found["brightness"][0].values()) == [1, 1, 1]


def test_equal_scores_count_half(model, make_pairs):
    batch = make_pairs("a", "b")
    batch.images["chosen"][0] = batch.images["rejected"][0]
    batch.images["chosen"][1] = batch.images["rejected"][1] + 0.1
    scorers = {"brightness": Brightness()}
    found = accuracy_by_timestep(scorers, model, [batch], guidance=1.0, timesteps=(0,))
    first, second = batch.captions
    assert found["brightness"][0] == {(first, 0): 0.5, (second, 1): 1.0}


def test_decided_pairs_come_once_each_and_ties_not_at_all(tmp_path):
    rows = layouts.pickapic_rows(layouts.make_pairs(5))
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    layouts.write_rows(tmp_path / "train.parquet", rows)
    config = PairConfig(path=str(tmp_path), resolution=16, flip=False)
    batches = list(decided_pairs(config, batch_size=3))
    ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
    assert [len(batch) for batch in batches] == [3, 1]
    assert len(set(ids)) == 4
    limited = decided_pairs(dataclasses.replace(config, limit=2), batch_size=3)
    assert [batch.sample_ids for batch in limited] == [tuple(ids[:2])]
