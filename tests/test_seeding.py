from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffalign.seeding import (
    TimestepSampling,
    derive_seed,
    noise_from_seeds,
    unit_interval,
)


def test_seeds_are_the_same_on_every_machine():
    # Pinned: a change would silently change every run that is resumed or compared.
    assert derive_seed(0, "pair-1", 3, "noise") == 7966924654377885217
    assert derive_seed(0, "pair-1", 3) != derive_seed(0, "pair-1", 4)


def test_parts_do_not_run_together():
    assert derive_seed("ab", "c") != derive_seed("a", "bc")


def test_numbers_are_uniform():
    values = torch.tensor([unit_interval(7, i) for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.02)


def test_noise_of_a_row_does_not_depend_on_the_others():
    together = noise_from_seeds([3, 5, 8], (2, 4, 4))
    assert torch.equal(noise_from_seeds([8], (2, 4, 4))[0], together[2])


def test_uniform_timesteps_cover_the_schedule_evenly():
    sampling = TimestepSampling()
    sampled = [sampling.sample(0, f"s{i}", 0, schedule_length=1000) for i in range(4000)]
    assert min(sampled) >= 0 and max(sampled) < 1000
    quarters = Counter(int(t // 250) for t in sampled)
    assert all(900 < quarters[q] < 1100 for q in range(4))


def test_a_range_is_respected():
    sampling = TimestepSampling(low=200, high=300)
    sampled = [sampling.sample(0, f"s{i}", 0, schedule_length=1000) for i in range(200)]
    assert min(sampled) >= 200 and max(sampled) < 300


def test_strata_visit_every_part_once_per_cycle():
    sampling = TimestepSampling(strata=8)
    sampled = [sampling.sample(1, "sample", k, schedule_length=1000) for k in range(8)]
    assert sorted(int(t // 125) for t in sampled) == list(range(8))


def test_listed_values_are_the_only_ones():
    sampling = TimestepSampling(values=(249, 499, 749, 999))
    sampled = Counter(sampling.sample(0, f"s{i}", 0, schedule_length=1000) for i in range(400))
    assert set(sampled) == {249.0, 499.0, 749.0, 999.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 5, "high": 5}, "0 <= low < high"),
        ({"strata": 0}, "strata must be at least 1"),
        ({"values": (1,), "high": 10}, "exclude each other"),
        ({"values": (-1,)}, r"values\[0\] must be at least 0"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TimestepSampling(**fields)


@pytest.mark.parametrize("fields", [{"high": 1001}, {"values": (1000,)}, {"low": 1000}])
def test_timesteps_beyond_the_schedule_are_refused(fields):
    TimestepSampling(high=1000).check(1000)
    with pytest.raises(ValueError, match="the model's schedule has 1000: 0 to 999"):
        TimestepSampling(**fields).check(1000)
