from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from diffalign.timesteps import ResolutionShift, TimestepSampling, shifted


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
        ({"values": (1,), "shift": 3.0}, "values are used as they are"),
        ({"std": 0.0}, "std must be greater than 0"),
        ({"shift": 0.0}, "shift must be greater than 0"),
        ({"shift": 3.0, "shift_by_resolution": ResolutionShift()}, "exclude each other"),
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


@pytest.mark.parametrize(
    ("share", "moved"), [(0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 27 / 28)]
)
def test_a_shift_of_three_moves_times_as_sd3_does(share, moved):
    assert shifted(share, 3.0) == pytest.approx(moved, abs=1e-12)
    assert shifted(shifted(share, 3.0), 1 / 3) == pytest.approx(share, abs=1e-12)
    assert shifted(share, 1.0) == share


def test_the_shift_is_that_of_the_table_of_diffusers():
    # Its table runs from noise to image, in float32.
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps
    for index, given in ((0, 1000.0), (250, 900.0), (500, 750.0), (750, 500.0), (999, 2.994012)):
        assert theirs[index].item() == pytest.approx(given, abs=1e-4)
        ours = 1000 * shifted((1000 - index) / 1000, 3.0)
        assert ours == pytest.approx(given, abs=1e-6)


@pytest.mark.parametrize(
    ("side", "mu"),
    [(256, 0.5), (512, 0.63), (768, 0.846666666667), (1024, 1.15), (1536, 2.016666666667)],
)
def test_a_shift_by_resolution_grows_with_the_image(side, mu):
    shift = ResolutionShift()
    assert shift.mu((side // 16) ** 2) == pytest.approx(mu, abs=1e-11)
    assert shift.factor((side, side)) == pytest.approx(math.exp(mu))
    theirs = calculate_shift((side // 16) ** 2, 256, 4096, 0.5, 1.15)
    assert shift.mu((side // 16) ** 2) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "moved"),
    [
        ((1024, 1024), [0.904530766739, 0.759510916949, 0.512844101509]),
        ((512, 512), [0.849234819, 0.652489424, 0.384944737]),
    ],
)
def test_mu_is_the_logarithm_of_the_shift(size, moved):
    factor = ResolutionShift().factor(size)
    assert [shifted(s, factor) for s in (0.75, 0.5, 0.25)] == pytest.approx(moved, abs=1e-7)
    assert ResolutionShift().factor((1024, 1024)) == pytest.approx(3.158, abs=1e-3)
    assert ResolutionShift().factor((2048, 512)) == ResolutionShift().factor((1024, 1024))


def density(sampling, share, step=1e-6):
    """Of the quantile's distribution, by a difference quotient of the share of times below."""
    low, high = 0.0, 1.0
    edges = []
    for edge in (share - step, share + step):
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if sampling.quantile(middle) < edge else (low, middle)
        edges.append((low + high) / 2)
    return (edges[1] - edges[0]) / (2 * step)


@pytest.mark.parametrize(
    ("mean", "densities"),
    [
        (0.0, [0.396574704357, 1.163652098240, 1.595769121606, 1.163652098240, 0.396574704357]),
        (-0.5, [1.049927844716, 1.778676528244, 1.408261307057, 0.592892176081, 0.116658649413]),
    ],
)
def test_logit_normal_times_have_their_density(mean, densities):
    sampling = TimestepSampling(distribution="logit_normal", mean=mean)
    found = [density(sampling, share) for share in (0.1, 0.25, 0.5, 0.75, 0.9)]
    assert found == pytest.approx(densities, abs=1e-6)


def test_logit_normal_times_have_their_quantiles():
    sampling = TimestepSampling(distribution="logit_normal")
    found = [sampling.quantile(fraction) for fraction in (0.1, 0.25, 0.5, 0.9)]
    expected = [0.217286228541, 0.337492240748, 0.5, 0.782713771459]
    assert found == pytest.approx(expected, abs=1e-11)
    assert 0 < sampling.quantile(0.0) < sampling.quantile(1 - 2**-53) < 1
    wide = TimestepSampling(distribution="logit_normal", std=50.0)
    assert 0 <= wide.quantile(0.0) < wide.quantile(1 - 2**-53) < 1


def test_logit_normal_times_prefer_the_middle():
    sampling = TimestepSampling(distribution="logit_normal")
    times = [sampling.sample(0, f"s{i}", 0, schedule_length=1000) for i in range(8000)]
    share = sum(400 < t < 600 for t in times) / len(times)
    assert share == pytest.approx(0.314864338970, abs=0.02)


def test_a_shifted_logit_normal_is_one_of_another_mean():
    # The shift multiplies the odds: it adds its logarithm to the logit.
    shift = TimestepSampling(distribution="logit_normal", shift=3.0)
    mean = TimestepSampling(distribution="logit_normal", mean=math.log(3.0))
    for i in range(50):
        ours = shift.sample(0, f"s{i}", 0, schedule_length=1000)
        assert ours == pytest.approx(mean.sample(0, f"s{i}", 0, schedule_length=1000), rel=1e-12)


def test_strata_hold_for_every_distribution():
    sampling = TimestepSampling(distribution="logit_normal", strata=4)
    edges = [1000 * sampling.quantile(fraction) for fraction in (0.25, 0.5, 0.75)]
    times = [sampling.sample(1, "sample", k, schedule_length=1000) for k in range(4)]
    assert sorted(sum(time >= edge for edge in edges) for time in times) == [0, 1, 2, 3]


def test_uniform_times_are_what_they_always_were():
    # Pinned: a change would silently change every run that is resumed or compared.
    sampling = TimestepSampling()
    times = [sampling.sample(7, f"s{i}", 2, schedule_length=1000) for i in range(3)]
    assert times == [158.06075141887666, 900.1145114627051, 291.2871804463493]
    assert TimestepSampling(strata=4).sample(7, "s0", 2, schedule_length=1000) == 289.5151878547192


def test_a_shift_by_resolution_needs_a_size():
    sampling = TimestepSampling(shift_by_resolution=ResolutionShift())
    with pytest.raises(ValueError, match="needs the size of the images"):
        sampling.sample(0, "s", 0, schedule_length=1000)
    small = sampling.sample(0, "s", 0, schedule_length=1000, size=(256, 256))
    assert small < sampling.sample(0, "s", 0, schedule_length=1000, size=(1024, 1024)) < 1000


def logistic_normal_share(time, mean=0.0, std=1.0):
    return NormalDist(mean, std).cdf(math.log(time / (1000 - time)))


SHARES_BELOW = {
    "uniform": (TimestepSampling(), lambda t: t / 1000),
    "range": (TimestepSampling(low=200, high=600), lambda t: (t - 200) / 400),
    "logit_normal": (
        TimestepSampling(distribution="logit_normal", mean=0.5, std=2.0),
        lambda t: logistic_normal_share(t, 0.5, 2.0),
    ),
    "shift": (TimestepSampling(shift=3.0), lambda t: t / (3000 - 2 * t)),  # the odds times three
    "shifted logit_normal": (
        TimestepSampling(distribution="logit_normal", shift=3.0),
        lambda t: logistic_normal_share(t, math.log(3.0)),
    ),
    "shift_by_resolution": (
        TimestepSampling(shift_by_resolution=ResolutionShift()),
        lambda t: t / (1000 * math.exp(1.15) - (math.exp(1.15) - 1) * t),
    ),
}
"""Ways to sample a time, and which share of the times is to lie below one."""


def times_of(sampling, name, visits):
    return [
        sampling.sample(3, name, visit, schedule_length=1000, visits=visits, size=(1024, 1024))
        for visit in range(visits)
    ]


@pytest.mark.parametrize("kind", SHARES_BELOW)
@pytest.mark.parametrize("visits", [1, 2, 5, 7])
def test_the_times_of_few_visits_are_one_in_each_equally_probable_part(kind, visits):
    sampling, share_below = SHARES_BELOW[kind]
    orders = set()
    for n in range(30):
        parts = [int(visits * share_below(time)) for time in times_of(sampling, f"s{n}", visits)]
        assert sorted(parts) == list(range(visits))
        orders.add(tuple(parts))
    assert len(orders) > (1 if visits > 2 else visits - 1)


@pytest.mark.parametrize("kind", SHARES_BELOW)
def test_the_time_of_each_of_few_visits_alone_has_the_distribution_it_is_to_have(kind):
    sampling, share_below = SHARES_BELOW[kind]
    count = 3000
    for visit in (0, 3):
        times = (times_of(sampling, f"s{n}", 4)[visit] for n in range(count))
        shares = sorted(map(share_below, times))
        gap = max(abs(share - (n + 0.5) / count) for n, share in enumerate(shares))
        assert gap < 1.63 / math.sqrt(count)  # Kolmogorov and Smirnov, at one in a hundred


def test_listed_values_are_shared_out_over_few_visits():
    sampling = TimestepSampling(values=(249, 499, 749, 999))
    for n in range(20):
        assert sorted(times_of(sampling, f"s{n}", 4)) == [249.0, 499.0, 749.0, 999.0]
        assert Counter(times_of(sampling, f"s{n}", 8)) == dict.fromkeys(sampling.values, 2)
