from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors import safe_open

from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.rollouts.round_order import Visit
from diffalign.rollouts.trajectories import finite, sample_groups, write_trajectories

PROCESS = ReverseProcess(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def model(tiny_sd15):
    return SD15(path=str(tiny_sd15)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )


def generate(model, *visits, images=3, **changes):
    return sample_groups(model, PROCESS, visits, images=images, **changes)


def test_images_of_one_visit_start_from_the_same_noise_and_part_at_the_first_step(model):
    latents = generate(model, Visit("a cat", 1), Visit("a dog", 2)).latents
    assert latents.shape == (3, 6, 4, 4, 4)
    for group in (latents[:, :3], latents[:, 3:]):
        start, first = group[0], group[1]
        assert torch.equal(start[0], start[1]) and torch.equal(start[0], start[2])
        assert not torch.allclose(first[0], first[1], atol=0.1)
        assert not torch.allclose(first[0], first[2], atol=0.1)
    assert not torch.allclose(latents[0, 0], latents[0, 3], atol=0.1)


def test_a_visit_is_generated_alike_in_any_company(model):
    together = generate(model, Visit("a cat", 1), Visit("a dog", 2)).latents[:, 3:]
    alone = generate(model, Visit("a dog", 2)).latents
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_visit_with_another_seed_has_other_noise_at_every_step(model):
    first, second = generate(model, Visit("a cat", 1)), generate(model, Visit("a cat", 2))
    for one, other in zip(first.latents, second.latents, strict=True):
        assert not torch.allclose(one, other, atol=0.1)


def test_another_size_may_be_generated(model):
    assert generate(model, Visit("a cat", 1), size=(48, 16)).latents.shape == (3, 3, 4, 6, 2)


def test_a_row_of_the_file_is_a_trajectory_at_a_step(model, tmp_path):
    trajectories = generate(model, Visit("a cat", 1), Visit("a dog", 2))
    write_trajectories(tmp_path / "x.safetensors", trajectories, seed="7")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"seed": "7"}
        rows = file.get_tensor("latents")
        assert torch.equal(file.get_tensor("log_likelihoods"), trajectories.log_likelihoods)
    for step in range(3):
        for number in range(6):
            assert torch.equal(rows[step * 6 + number], trajectories.latents[step, number])


def test_one_number_that_is_none_spoils_its_trajectory_alone(model):
    trajectories = generate(model, Visit("a cat", 1))
    latents = trajectories.latents.clone()
    latents[1, 2, 0, 0, 0] = torch.inf
    assert finite(trajectories) == [True, True, True]
    assert finite(dataclasses.replace(trajectories, latents=latents)) == [True, True, False]
