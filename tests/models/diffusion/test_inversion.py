"""Walks against values of the authors' code with diffusers' DDIMInverseScheduler, float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.models.diffusion.inversion import Inversion, inverted, noise_within
from diffalign.models.diffusion.noising import Epsilon, StraightPath, Velocity
from tests.objectives.fixtures import KEPT, normal

NOISING = Epsilon(schedule_length=1000, alphas_cumprod=KEPT, steps_offset=1)
"""Of Stable Diffusion, in float64, where diffusers has it in float32."""
CLEAN = normal(60, 1, 1, 2, 2)
INPO, SMPO = Inversion(steps=10), Inversion(steps=5, refined=True)


def scaled(latents, times, rows):
    return 0.3 * latents


def drifting(latents, times, rows):
    return 0.3 * latents + 0.2 * times.double().view(-1, 1, 1, 1) / 1000


def walk(settings, last, predict=scaled, clean=CLEAN, **more):
    """Latents at the last time of a grid that is at most `last`."""
    return inverted(
        clean,
        torch.full((len(clean),), last),
        predict,
        NOISING,
        times=settings.times,
        refined=settings.refined,
        **more,
    )


def noise_of(latents, t):
    return noise_within(latents, CLEAN, torch.tensor([t]), NOISING).flatten().tolist()


RELEASED = {
    # Settings, network, where the walk stopped, the time it was taken for -> the noise.
    (INPO, scaled, 401, 501): [-0.376629874573, -0.239565725819, 0.475602785369, -0.507360659754],
    (INPO, scaled, 501, 550): [-0.315446546101, -0.200648397473, 0.398341358690, -0.424940182794],
    (INPO, scaled, 801, 900): [-0.261838060200, -0.166549254782, 0.330645334197, -0.352723827664],
    (INPO, scaled, 0, 1): [-0.019033094948, -0.012106520256, 0.024034718386, -0.025639611358],
    (INPO, drifting, 401, 501): [-0.329507632564, -0.192443483810, 0.522725027378, -0.460238417745],
    (SMPO, scaled, 401, 501): [-0.370667207230, -0.235773008283, 0.468073214859, -0.499328310115],
    (SMPO, scaled, 801, 900): [-0.250387571621, -0.159265858555, 0.316185822008, -0.337298796799],
}
CONSISTENT = {
    (INPO, 501): [-0.261484481922, -0.166324351655, 0.330198840636, -0.352247519966],
    (SMPO, 401): [-0.262702049119, -0.167098818549, 0.331736366970, -0.353887712999],
}


@pytest.mark.parametrize(("settings", "predict", "stopped", "taken_for"), RELEASED)
def test_the_walk_is_that_of_the_authors_up_to_where_it_stops(
    settings, predict, stopped, taken_for
):
    latents = walk(settings, stopped, predict)
    expected = RELEASED[settings, predict, stopped, taken_for]
    assert noise_of(latents, taken_for) == pytest.approx(expected, abs=1e-10)


def test_new_noise_is_that_of_the_authors():
    latents = walk(INPO, 401, eta=0.1, added=lambda number: normal(70 + number, 1, 1, 2, 2))
    expected = [-0.307125696035, -0.231672359391, 0.471484657545, -0.409490868018]
    assert noise_of(latents, 501) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("settings", "t"), CONSISTENT)
def test_a_time_is_the_one_that_the_walk_arrives_at(settings, t):
    latents = walk(settings, t)
    assert noise_of(latents, t) == pytest.approx(CONSISTENT[settings, t], abs=1e-10)
    noise = noise_within(latents, CLEAN, torch.tensor([t]), NOISING)
    assert torch.allclose(NOISING.corrupt(CLEAN, noise, torch.tensor([float(t)])), latents)


def test_what_is_taken_for_a_later_time_is_too_large():
    size = torch.tensor(RELEASED[INPO, scaled, 401, 501]).norm()
    assert size / torch.tensor(CONSISTENT[INPO, 501]).norm() == pytest.approx(1.44, abs=5e-3)
    # Two times between the same steps have the same latents there, and so other noise.
    assert torch.equal(walk(SMPO, 500), walk(SMPO, 600))
    assert noise_of(walk(SMPO, 500), 500) != pytest.approx(noise_of(walk(SMPO, 600), 600), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "last", "expected"),
    [
        (INPO, 401, [1, 101, 201, 301, 401]),
        (SMPO, 401, [1, 1, 201, 201, 401, 401]),
        (INPO, 1, [1]),
        (INPO, 0, []),
    ],
)
def test_each_step_is_one_evaluation_or_two(settings, last, expected):
    seen = []

    def predict(latents, times, rows):
        seen.extend(times.tolist())
        return 0.3 * latents

    walk(settings, last, predict)
    assert seen == expected


@pytest.mark.parametrize("settings", [INPO, SMPO])
def test_each_row_walks_to_its_own_time(settings):
    clean = normal(61, 3, 1, 2, 2)
    t = torch.tensor([settings.times[3], settings.times[0], settings.times[2]])
    more = {"times": settings.times, "refined": settings.refined}
    noise = {"eta": 0.5, "added": lambda number: normal(70 + number, 3, 1, 2, 2)}
    together = inverted(clean, t, scaled, NOISING, **more, **noise)
    for row in range(3):
        own = {"eta": 0.5, "added": lambda n, row=row: normal(70 + n, 3, 1, 2, 2)[row : row + 1]}
        alone = inverted(clean[row : row + 1], t[row : row + 1], scaled, NOISING, **more, **own)
        assert torch.equal(together[row : row + 1], alone)


def test_rows_are_named_to_the_model():
    seen = []

    def predict(latents, times, rows):
        seen.append(rows.tolist())
        return 0.3 * latents

    inverted(
        CLEAN.repeat(3, 1, 1, 1), torch.tensor([201, 1, 101]), predict, NOISING, times=(1, 101, 201)
    )
    assert seen == [[0, 1, 2], [0, 2], [0]]


def test_new_noise_goes_up_to_the_end_of_the_schedule():
    """Where the authors' code looks it up behind the end, which raises an IndexError."""
    latents = walk(INPO, 999, eta=0.1, added=lambda number: normal(70 + number, 1, 1, 2, 2))
    assert latents.isfinite().all()
    plain = walk(INPO, 999)
    assert not torch.equal(latents, plain)


def test_the_grid_is_that_of_stable_diffusion():
    assert INPO.times == tuple(range(1, 1000, 100))
    assert SMPO.times == (1, 201, 401, 601, 801)
    assert Inversion(steps=500).times[-1] == 999
    with pytest.raises(ValueError, match="steps must be between 1 and 500, got 501"):
        Inversion(steps=501)


def test_a_model_of_velocities_walks_as_one_of_noise_does():
    velocity = Velocity(schedule_length=1000, alphas_cumprod=KEPT)

    def as_velocity(latents, times, rows):
        share = velocity.alphas_cumprod[times].view(-1, 1, 1, 1)
        noise = 0.3 * latents
        image = (latents - (1 - share).sqrt() * noise) / share.sqrt()
        return share.sqrt() * noise - (1 - share).sqrt() * image

    t = torch.tensor([501])
    found = inverted(CLEAN, t, as_velocity, velocity, times=INPO.times)
    assert torch.allclose(found, walk(INPO, 501))


def test_what_has_no_such_steps_is_refused():
    with pytest.raises(ValueError, match="this model follows a straight path"):
        INPO.check(StraightPath(schedule_length=1000))
    shorter = dataclasses.replace(
        NOISING, schedule_length=500, alphas_cumprod=NOISING.alphas_cumprod[:500]
    )
    with pytest.raises(ValueError, match="in 1000 training timesteps, and this model has 500"):
        INPO.check(shorter)
    INPO.check(NOISING)
