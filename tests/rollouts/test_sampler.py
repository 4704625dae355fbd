from __future__ import annotations

import pytest
import torch

from diffalign.likelihoods.transition import transition_log_likelihood
from diffalign.models.diffusion.reverse import ReverseProcess, reverse_step
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.rollouts.sampler import sample
from diffalign.seeding import noise_from_seeds

CPU = torch.device("cpu")
PROCESS = ReverseProcess(steps=3)
PROMPTS = ["a red circle", "two cats", "fog"]
SHAPE = (4, 4, 4)


def load(folder, settings=SD15, *, lora=None, reference="none", dtype=torch.float32):
    return settings(path=str(folder), lora=lora).load(
        device=CPU, compute_dtype=dtype, reference=reference
    )


@pytest.fixture
def model(tiny_sd15):
    lora = LoraSettings(rank=2, dropout=0.5)
    return load(tiny_sd15, lora=lora, reference="adapter_off")


def change(model):
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def generate(model, rows=(0, 1, 2), *, process=PROCESS, **changes):
    """Trajectories of some of three prompts; a row's seeds are its own."""
    arguments = {
        "start_seeds": [100 + row for row in rows],
        "step_seeds": lambda step: [10 * step + row for row in rows],
    }
    return sample(model, process, [PROMPTS[row] for row in rows], **(arguments | changes))


def test_shapes_times_and_types(model):
    trajectories = generate(model)

    assert trajectories.latents.shape == (4, 3, *SHAPE)
    assert trajectories.log_likelihoods.shape == (3, 3)
    assert trajectories.times == ((667, 334), (334, 1), (1, 0))
    for tensor in (trajectories.latents, trajectories.log_likelihoods):
        assert tensor.dtype == torch.float32
        assert tensor.device == CPU
        assert not tensor.requires_grad
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("backbone", ["sd15", "sd15_v", "sdxl", "sdxl_v"])
def test_every_step_is_a_generate_from_where_the_model_would_step(request, backbone):
    folder = request.getfixturevalue(f"tiny_{backbone}")
    model = load(folder, SDXL if "sdxl" in backbone else SD15)
    trajectories = generate(model)

    assert torch.equal(trajectories.latents[0], noise_from_seeds([100, 101, 102], SHAPE))
    with model.sampling():
        denoise = model.denoiser(PROMPTS, guidance=5.0)
        for index, (t, t_next) in enumerate(trajectories.times):
            state, outcome = trajectories.latents[index], trajectories.latents[index + 1]
            step = reverse_step(denoise, model.noising, state, t, t_next, eta=PROCESS.eta)
            noise = noise_from_seeds([10 * index + row for row in range(3)], SHAPE)
            assert torch.equal(outcome, step.mean + step.std.reshape(3, 1, 1, 1) * noise)
            expected = transition_log_likelihood(outcome, step.mean, step.std, reduction="mean")
            assert torch.equal(trajectories.log_likelihoods[index], expected)


def test_equal_start_seeds_start_from_equal_noise_and_part_ways(model):
    group = generate(model, start_seeds=[7, 7, 7]).latents

    assert torch.equal(group[0, 0], group[0, 1])
    assert not torch.equal(group[-1, 0], group[-1, 1])
    assert not torch.equal(group[0, 0], generate(model).latents[0, 0])


def test_the_company_of_a_row_does_not_change_it(model):
    together, alone, turned = generate(model), generate(model, [1]), generate(model, [2, 1, 0])

    for other, row in ((alone, 0), (turned, 1)):
        torch.testing.assert_close(
            other.latents[:, row], together.latents[:, 1], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            other.log_likelihoods[:, row], together.log_likelihoods[:, 1], rtol=0, atol=1e-5
        )


def test_the_same_call_gives_the_same_bits(model):
    first = generate(model)
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()

    second = generate(model)

    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.log_likelihoods, second.log_likelihoods)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "changes",
    [
        {"start_seeds": [1, 2, 3]},
        {"step_seeds": lambda step: [1000 + step] * 3},
        {"process": ReverseProcess(steps=3, guidance=4.0)},
        {"process": ReverseProcess(steps=3, eta=0.5)},
    ],
    ids=["start_seeds", "step_seeds", "guidance", "eta"],
)
def test_everything_that_is_given_counts(model, changes):
    assert not torch.equal(generate(model).latents[-1], generate(model, **changes).latents[-1])


def test_the_noise_of_a_step_reaches_no_earlier_step(model):
    late = generate(
        model, step_seeds=lambda step: [99] * 3 if step == 2 else [10 * step + i for i in range(3)]
    )

    usual = generate(model)

    assert torch.equal(late.latents[:3], usual.latents[:3])
    assert not torch.equal(late.latents[3], usual.latents[3])


@pytest.mark.parametrize(("guidance", "branches"), [(1.0, 1), (5.0, 2)])
def test_guidance_costs_a_second_row_a_step(model, guidance, branches):
    generate(model, process=ReverseProcess(steps=3, guidance=guidance))

    assert model.evaluations == 3 * 3 * branches


def test_prompts_are_encoded_before_the_first_step_and_kept(model, monkeypatch):
    asked = []
    encode = type(model.prompts.conditioner).encode
    monkeypatch.setattr(
        type(model.prompts.conditioner),
        "encode",
        lambda self, p: asked.extend(p) or encode(self, p),
    )

    for _ in range(2):
        generate(model, [0, 1, 0])

    assert sorted(asked) == ["", "a red circle", "two cats"]


def test_the_policy_is_sampled_or_within_reference_the_reference(model):
    start = generate(model).latents
    change(model)

    policy = generate(model).latents
    with model.reference():
        reference = generate(model).latents

    assert torch.equal(reference, start)
    assert not torch.equal(policy, start)


def test_dropout_is_off_while_sampling_and_back_on_afterwards(model):
    change(model)

    assert torch.equal(generate(model).latents, generate(model).latents)
    assert model.network.training


def test_another_size_than_the_networks_own(model):
    assert generate(model, size=(16, 64)).latents.shape == (4, 3, 4, 2, 8)
    with pytest.raises(ValueError, match=r"images of 20x32 pixels do not fit .* multiples of 8"):
        generate(model, size=(20, 32))


def test_sdxl_is_told_the_size_that_is_sampled(tiny_sdxl):
    model = load(tiny_sdxl, SDXL)
    told = []
    model.network.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )

    generate(model, [0], size=(16, 64))

    assert [rows.tolist() for rows in told] == [[[16, 64, 0, 0, 16, 64]] * 2] * 3


def test_under_reduced_precision_latents_stay_float32(tiny_sd15):
    model = load(tiny_sd15, dtype=torch.bfloat16)
    trajectories = generate(model)

    assert trajectories.latents.dtype == torch.float32
    assert torch.equal(trajectories.latents[0], noise_from_seeds([100, 101, 102], SHAPE))
    rounded = trajectories.latents.bfloat16().float()
    assert not torch.equal(trajectories.latents[1:], rounded[1:])
