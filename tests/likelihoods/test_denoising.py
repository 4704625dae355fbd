from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diffalign.likelihoods.denoising import Denoising, denoising_log_likelihood
from diffalign.models.diffusion.noising import StraightPath
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.objectives.dpo import dpo_loss

CPU = torch.device("cpu")
VIEWS = ("chosen", "rejected")


@pytest.fixture(params=["sd15", "sd15_v", "sdxl", "sdxl_v"])
def model(request):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    settings = (SDXL if "sdxl" in request.param else SD15)(
        path=str(folder), lora=LoraSettings(rank=2)
    )
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="adapter_off")


def rows(model, batch):
    likelihood = Denoising()
    with torch.no_grad():
        return likelihood.evaluate(model, likelihood.prepare(model, batch))


def reordered(batch, order):
    """The same samples in another order, or fewer of them."""

    def pick(value):
        if isinstance(value, torch.Tensor):
            return value[order]
        if isinstance(value, dict):
            return {key: pick(part) for key, part in value.items()}
        if value is None:
            return None
        return tuple(value[i] for i in order if value)

    return dataclasses.replace(
        batch, **{f.name: pick(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    )


def test_value_worked_by_hand():
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 4.0]]], [[[3.0, 0.0]]]])

    result = denoising_log_likelihood(prediction, target)

    assert result.tolist() == [-0.5 * (1 + 4) / 2, -0.5 * 9 / 2]


def test_gradient_worked_by_hand():
    prediction = torch.tensor([[1.0, 2.0]], requires_grad=True)

    denoising_log_likelihood(prediction, torch.tensor([[0.0, 4.0]])).sum().backward()

    assert prediction.grad.tolist() == [[-0.5, 1.0]]  # (target - prediction) / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_errors_of_the_published_code_are_reproduced(dtype, tolerance):
    def normal(seed, rows):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((rows, 4, 8, 8)))

    target = torch.cat([normal(0, 3)] * 2).to(dtype)
    prediction = target + 0.1 * normal(1, 6).to(dtype)
    expected = [
        0.009414474677,
        0.010022800237,
        0.010542700888,
        0.008824714562,
        0.009643268322,
        0.011264952026,
    ]

    errors = -2 * denoising_log_likelihood(prediction, target)

    assert errors.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(dtype):
    target = torch.randn((1, 4, 64, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    prediction = (target.float() * 1.01).to(dtype)
    exact = -0.5 * (prediction.double() - target.double()).square().mean()

    result = denoising_log_likelihood(prediction, target)

    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(2, 4\), target \(1, 4\)"):
        denoising_log_likelihood(torch.zeros(2, 4), torch.zeros(1, 4))


def test_a_better_prediction_is_more_likely():
    target = torch.zeros(2, 4)
    prediction = torch.tensor([[0.1] * 4, [0.2] * 4])

    better, worse = denoising_log_likelihood(prediction, target)

    assert better > worse


def test_every_view_gets_one_float32_number_per_sample(model, make_pairs):
    result = rows(model, make_pairs("a", "b", "c"))

    assert tuple(result) == VIEWS
    assert all(result[view].shape == (3,) for view in VIEWS)
    assert all(result[view].dtype == torch.float32 for view in VIEWS)


def test_the_order_of_a_batch_changes_no_row(model, make_pairs):
    batch = make_pairs("a", "b", "c", "d")
    order = [2, 0, 3, 1]

    straight, shuffled = rows(model, batch), rows(model, reordered(batch, order))

    for view in VIEWS:
        torch.testing.assert_close(shuffled[view], straight[view][order], rtol=0, atol=1e-6)


def test_the_company_of_a_row_does_not_change_it(model, make_pairs):
    batch = make_pairs("a", "b", "c")

    together, alone = rows(model, batch), rows(model, reordered(batch, [1]))

    for view in VIEWS:
        torch.testing.assert_close(alone[view], together[view][[1]], rtol=0, atol=1e-6)


def test_the_views_of_a_sample_share_time_noise_and_prompt(model, make_pairs):
    batch = make_pairs("a", "b")
    same = dataclasses.replace(
        batch,
        images=dict.fromkeys(VIEWS, batch.images["chosen"]),
        original_sizes=dict.fromkeys(VIEWS, batch.original_sizes["chosen"]),
        crop_corners=dict.fromkeys(VIEWS, batch.crop_corners["chosen"]),
        encoding_seeds=dict.fromkeys(VIEWS, batch.encoding_seeds["chosen"]),
    )

    result = rows(model, same)

    torch.testing.assert_close(result["chosen"], result["rejected"], rtol=0, atol=1e-6)


def test_views_may_be_framed_differently(tiny_sdxl, make_pairs):
    settings = SDXL(path=str(tiny_sdxl))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="none")

    prepared = Denoising().prepare(model, make_pairs("a", "b"))
    ids = prepared.conditioning["added_cond_kwargs"]["time_ids"]

    batch = make_pairs("a", "b")
    assert torch.equal(ids[:2, :2], batch.original_sizes["chosen"].float())
    assert torch.equal(ids[2:, :2], batch.original_sizes["rejected"].float())
    assert torch.equal(ids[2:, 2:4], batch.crop_corners["rejected"].float())
    assert ids[:, 4:].unique().tolist() == [32]


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": torch.tensor([500.0], dtype=torch.float64)},
        {"noise_seeds": (1,)},
        {"encoding_seeds": {"chosen": (1,), "rejected": (2,)}},
        {"prompts": ("",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_random_choice_of_the_batch_counts(model, make_pairs, change):
    batch = make_pairs("a")

    before, after = rows(model, batch), rows(model, dataclasses.replace(batch, **change))

    assert all(before[view] != after[view] for view in VIEWS)


def test_each_view_is_encoded_with_its_own_seeds(model, make_pairs):
    batch = make_pairs("a")
    seeds = {**batch.encoding_seeds, "rejected": (1,)}

    before, after = (
        rows(model, batch),
        rows(model, dataclasses.replace(batch, encoding_seeds=seeds)),
    )

    torch.testing.assert_close(after["chosen"], before["chosen"], rtol=0, atol=1e-6)
    assert after["rejected"] != before["rejected"]


def test_framing_counts_for_sdxl(tiny_sdxl, make_pairs):
    settings = SDXL(path=str(tiny_sdxl))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="none")
    batch = make_pairs("a")
    moved = {view: corner + 64 for view, corner in batch.crop_corners.items()}

    before, after = rows(model, batch), rows(model, dataclasses.replace(batch, crop_corners=moved))

    assert all(before[view] != after[view] for view in VIEWS)


def test_the_global_generator_is_neither_used_nor_moved(model, make_pairs):
    batch = make_pairs("a")
    first = rows(model, batch)
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()

    second = rows(model, batch)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[view], second[view]) for view in VIEWS)


def test_preparation_carries_no_gradient(model, make_pairs):
    prepared = Denoising().prepare(model, make_pairs("a"))

    assert not prepared.noisy.requires_grad
    assert not prepared.conditioning["encoder_hidden_states"].requires_grad


def test_beta_is_named_in_the_units_of_published_code():
    assert Denoising().published_scale(5000.0) == (
        " (Salesforce beta_dpo 5000, diffusers SD1.5 script beta_dpo 2500)"
    )


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def test_flow_dpo_has_the_value_of_the_published_lines():
    # Flow-GRPO's scripts/train_sd3_dpo.py, its lines run in float64: errors of the velocity.
    target = normal(50, 6, 4, 8, 8)
    prediction = target + 0.1 * normal(51, 6, 4, 8, 8)
    reference = target + 0.1 * normal(52, 6, 4, 8, 8)
    prediction.requires_grad_()
    ratio = denoising_log_likelihood(prediction, target) - denoising_log_likelihood(
        reference, target
    )
    loss = dpo_loss(ratio[:3] - ratio[3:], beta=100.0).mean()
    assert loss.item() == pytest.approx(0.682384674406, abs=1e-11)
    (gradient,) = torch.autograd.grad(loss, prediction)
    margin = (ratio[:3] - ratio[3:]).detach()
    pull = 100.0 * torch.sigmoid(-100.0 * margin) / 3 / target[0].numel()
    error = (prediction - target).detach()
    expected = torch.cat([pull, -pull])[:, None, None, None] * error
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


def test_a_straight_path_has_the_published_errors():
    clean, noise = normal(40, 2, 4, 8, 8), normal(41, 2, 4, 8, 8)
    noising = StraightPath(schedule_length=1000)
    t = torch.tensor([300.0, 800.0], dtype=torch.float64)
    target = noising.target(clean, noise, t)
    prediction = target + 0.2 * normal(43, 2, 4, 8, 8)
    errors = -2 * denoising_log_likelihood(prediction, target)
    assert errors.tolist() == pytest.approx([0.038963479638, 0.042004484283], abs=1e-11)


def test_the_distance_from_the_reference_is_that_of_the_predictions(model, make_pairs):
    likelihood, batch = Denoising(distance=True), make_pairs("a", "b")
    prepared = likelihood.prepare(model, batch)
    assert likelihood.row_metadata(prepared) == {}
    with torch.no_grad(), model.reference():
        likelihood.evaluate(model, prepared)
        theirs = model.predict(prepared.noisy, prepared.time, prepared.conditioning)
    for _, parameter in model.trained_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    likelihood.evaluate(model, prepared)
    own = model.predict(prepared.noisy, prepared.time, prepared.conditioning)

    found = likelihood.row_metadata(prepared)

    expected = (own - theirs).square().flatten(start_dim=1).mean(dim=1).chunk(2)
    assert tuple(found) == VIEWS
    for view, apart in zip(VIEWS, expected, strict=True):
        assert found[view]["distance"].requires_grad and (apart > 0).all()
        torch.testing.assert_close(found[view]["distance"], apart)


def test_a_distance_from_the_reference_cannot_be_known_in_advance():
    with pytest.raises(ValueError, match="distance compares predictions of policy and reference"):
        Denoising(distance=True).check_known_in_advance(frozenset(VIEWS))
