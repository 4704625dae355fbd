from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from diffalign.data.batches import StepBatch
from diffalign.likelihoods.transition import Transition, transition_log_likelihood
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.noising import Epsilon
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.rollouts.sampler import sample
from diffalign.shapes import expand_like

CPU = torch.device("cpu")
VIEWS = ("chosen", "rejected")
BACKBONES = ["sd15", "sd15_v", "sdxl", "sdxl_v"]
TRAININGS = [
    pytest.param(LoraSettings(rank=2), "adapter_off", id="lora"),
    pytest.param(LoraSettings(rank=2), "past_policy", id="lora_and_past"),
    pytest.param(None, "frozen_copy", id="full"),
    pytest.param(None, "past_policy", id="full_and_past"),
]


def load(request, backbone, *, lora=None, reference="none", dtype=torch.float32):
    folder = request.getfixturevalue(f"tiny_{backbone}")
    settings = (SDXL if "sdxl" in backbone else SD15)(path=str(folder), lora=lora)
    return settings.load(device=CPU, compute_dtype=dtype, reference=reference)


@pytest.fixture
def model(request):
    return load(request, "sd15", lora=LoraSettings(rank=2), reference="adapter_off")


def change(model):
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def random(seed, rows):
    return torch.randn((rows, 4, 4, 4), generator=torch.Generator().manual_seed(seed))


def shared_states(rows=3):
    """Pairs whose sides leave from the same state, one state a pair."""
    states = random(0, rows)
    t = torch.tensor([501, 51, 951, 301])[:rows]
    return StepBatch(
        sample_ids=tuple(f"step {i}" for i in range(rows)),
        states=states,
        prompts=("a red circle", "two cats", "fog", "one house")[:rows],
        t=t,
        t_next=t - 50,
        state_rows={view: torch.arange(rows) for view in VIEWS},
        outcomes={view: states + 0.1 * random(1 + i, rows) for i, view in enumerate(VIEWS)},
    )


def duplicated(batch):
    """The same pairs with a state for every side."""
    rows = len(batch)
    return dataclasses.replace(
        batch,
        states=torch.cat([batch.states, batch.states]),
        prompts=batch.prompts * 2,
        t=batch.t.repeat(2),
        t_next=batch.t_next.repeat(2),
        state_rows={"chosen": torch.arange(rows), "rejected": torch.arange(rows) + rows},
    )


def evaluate(model, batch, **settings):
    likelihood = Transition(**settings)
    return likelihood.evaluate(model, likelihood.prepare(model, batch))


def gradients_of_a_pair_loss(model, rows):
    model.network.zero_grad()
    loss = torch.nn.functional.softplus(rows["rejected"] - 2.0 * rows["chosen"]).mean()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.trained_parameters()}


# --- the density --------------------------------------------------------------------------------


def test_value_worked_by_hand():
    outcome = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]])
    mean = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    std = torch.tensor([2.0, 0.5])
    constant = 0.5 * math.log(2 * math.pi)
    expected = [-(1 + 4) / 2 / 8 - math.log(2) - constant, math.log(2) - constant]

    by_mean = transition_log_likelihood(outcome, mean, std)
    by_sum = transition_log_likelihood(outcome, mean, std, reduction="sum")

    assert by_mean.tolist() == pytest.approx(expected)
    assert by_sum.tolist() == pytest.approx([2 * row for row in expected])


def test_the_sum_is_the_density_of_torchs_own_normal():
    mean, std = random(0, 3), torch.tensor([0.02, 0.4, 1.5])
    outcome = mean + 0.3 * random(1, 3)
    normal = torch.distributions.Normal(mean, expand_like(std, mean))

    result = transition_log_likelihood(outcome, mean, std, reduction="sum")

    torch.testing.assert_close(result, normal.log_prob(outcome).flatten(1).sum(1))


def test_gradient_worked_by_hand():
    mean = torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)
    outcome = torch.tensor([[[[1.0, 3.0]]]], requires_grad=True)

    transition_log_likelihood(outcome, mean, torch.tensor([2.0])).sum().backward()

    assert mean.grad.flatten().tolist() == [1 / 4 / 2, 2 / 4 / 2]  # deviation / variance / N
    assert outcome.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_log_probabilities_of_the_published_code_are_reproduced(dtype, tolerance):
    """Three steps of a chosen and a rejected trajectory, under policy and reference."""

    def normal(seed):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((3, 4, 8, 8)))

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    noising = Epsilon(schedule_length=1000, alphas_cumprod=torch.cumprod(1 - betas, dim=0))
    t, t_next = torch.tensor([501, 101, 951]), torch.tensor([451, 51, 901])

    def log_likelihoods(states, reference, policy, visit):
        mean, std = noising.transition(states, reference, t, t_next, eta=1.0)
        outcome = mean + expand_like(std, mean) * visit
        results = []
        for prediction in (policy, reference):
            mean, std = noising.transition(
                states.to(dtype), prediction.to(dtype), t, t_next, eta=1.0
            )
            results.append(transition_log_likelihood(outcome.to(dtype), mean, std).tolist())
        return results

    chosen = log_likelihoods(normal(10), normal(12), normal(12) + 0.02 * normal(14), normal(16))
    rejected = log_likelihoods(normal(11), normal(13), normal(13) + 0.02 * normal(15), normal(17))

    expected = [
        [-0.502253272380, 0.443750758777, -0.993929278029],
        [-0.500708454624, 0.444627993236, -0.991375513794],
        [-0.618716625934, 0.366867951646, -1.053106044799],
        [-0.618004522770, 0.369025602669, -1.052512323182],
    ]
    for ours, theirs in zip([*chosen, *rejected], expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


def test_half_precision_is_reduced_in_float32():
    mean, std = random(0, 1).bfloat16(), torch.tensor([0.5]).bfloat16()

    result = transition_log_likelihood(mean.float() + 0.25, mean, std)

    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(-0.125 + math.log(2) - 0.5 * math.log(2 * math.pi))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"outcome \(1, 4, 4, 4\), mean \(2, 4, 4, 4\)"):
        transition_log_likelihood(random(0, 1), random(0, 2), torch.ones(2))
    with pytest.raises(ValueError, match="one value per row"):
        transition_log_likelihood(random(0, 2), random(0, 2), torch.ones(3))


# --- what is refused before weights -------------------------------------------------------------


def test_a_model_that_is_no_diffusion_model_is_refused():
    class Other(AbstractModel):
        trains_adapter = True
        library = "none"

        def describe(self):
            return ""

        def usage(self, folder):
            return ""

        def next_step(self, run):
            return ""

        def check(self):
            pass

        def load(self, **_):
            raise AssertionError

    with pytest.raises(ValueError, match="transition measures the steps of a diffusion model"):
        Transition().check(Other())


def test_a_model_whose_last_step_has_no_density_is_refused(tiny_sd15, tmp_path):
    target = tmp_path / "model"
    (target / "scheduler").mkdir(parents=True)
    config = (tiny_sd15 / "scheduler" / "scheduler_config.json").read_text()
    (target / "model_index.json").write_text((tiny_sd15 / "model_index.json").read_text())
    (target / "scheduler" / "scheduler_config.json").write_text(
        config.replace('"steps_offset": 1', '"steps_offset": 0')
    )

    Transition().check(SD15(path=str(tiny_sd15)))
    with pytest.raises(ValueError, match=r"adds no noise, .* set steps_offset to 1"):
        Transition().check(SD15(path=str(target)))


# --- rows ---------------------------------------------------------------------------------------


def test_every_view_gets_one_float32_number_per_pair(model):
    result = evaluate(model, shared_states())

    assert tuple(result) == VIEWS
    assert all(result[view].shape == (3,) for view in VIEWS)
    assert all(result[view].dtype == torch.float32 for view in VIEWS)
    assert all(result[view].requires_grad for view in VIEWS)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("backbone", ["sd15", "sdxl_v"])
def test_shared_states_give_the_loss_and_the_gradient_of_duplicated_ones(request, backbone, lora):
    model = load(request, backbone, lora=lora)
    change(model)
    batch = shared_states()

    shared = evaluate(model, batch)
    cost = model.evaluations
    loss, gradients = gradients_of_a_pair_loss(model, shared)
    apart = evaluate(model, duplicated(batch))
    loss_apart, gradients_apart = gradients_of_a_pair_loss(model, apart)

    assert model.evaluations == 3 * cost
    for view in VIEWS:
        torch.testing.assert_close(shared[view], apart[view], rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, loss_apart, rtol=0, atol=1e-6)
    assert any(gradient.norm() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            gradients_apart[name], gradient, rtol=1e-4, atol=1e-5 + 1e-4 * scale
        )


def test_the_order_of_states_and_of_pairs_changes_no_row(model):
    batch = duplicated(shared_states(4))
    order = torch.tensor([5, 2, 7, 0, 4, 1, 6, 3])
    pairs = [2, 0, 3, 1]
    place = torch.argsort(order)
    permuted = dataclasses.replace(
        batch,
        states=batch.states[order],
        prompts=tuple(batch.prompts[i] for i in order.tolist()),
        t=batch.t[order],
        t_next=batch.t_next[order],
        state_rows={view: place[rows[pairs]] for view, rows in batch.state_rows.items()},
        outcomes={view: rows[pairs] for view, rows in batch.outcomes.items()},
    )

    straight, shuffled = evaluate(model, batch), evaluate(model, permuted)

    for view in VIEWS:
        torch.testing.assert_close(shuffled[view], straight[view][pairs], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change_",
    [
        {"prompts": ("another",) * 3},
        {"t": torch.tensor([451, 101, 901])},
        {"t_next": torch.tensor([401, 31, 801])},
        {"states": random(9, 3)},
        {"outcomes": dict.fromkeys(VIEWS, random(9, 3))},
        {"state_rows": dict.fromkeys(VIEWS, torch.tensor([1, 2, 0]))},
    ],
    ids=lambda change_: next(iter(change_)),
)
def test_every_field_of_the_batch_counts(model, change_):
    batch = shared_states()

    before = evaluate(model, batch)
    after = evaluate(model, dataclasses.replace(batch, **change_))

    assert all((before[view] != after[view]).all() for view in VIEWS)


@pytest.mark.parametrize(
    "process",
    [ReverseProcess(guidance=4.0), ReverseProcess(eta=0.9), ReverseProcess(guidance=1.0)],
    ids=str,
)
def test_every_setting_of_the_process_counts(model, process):
    before, after = (
        evaluate(model, shared_states()),
        evaluate(model, shared_states(), process=process),
    )

    assert all((before[view] != after[view]).all() for view in VIEWS)


def test_the_sum_is_the_mean_times_the_numbers_of_a_latent(model):
    mean, total = (evaluate(model, shared_states(), reduction=by) for by in ("mean", "sum"))

    for view in VIEWS:
        torch.testing.assert_close(total[view], 4 * 4 * 4 * mean[view])


def test_the_size_told_to_sdxl_is_that_of_the_latents(request):
    model = load(request, "sdxl")
    batch = shared_states()
    wide = dataclasses.replace(batch, states=torch.zeros(3, 4, 2, 6))

    told = []
    model.network.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )

    prepared = Transition().prepare(model, wide)
    prepared.denoise(prepared.states, prepared.t)

    assert [ids.tolist() for ids in told] == [[[16, 48, 0, 0, 16, 48]] * 6]


def test_preparation_is_made_once(request, model):
    likelihood = Transition()
    prepared = likelihood.prepare(model, shared_states())
    with torch.no_grad():
        rows = [likelihood.evaluate(model, prepared) for _ in range(2)]

    assert all(torch.equal(rows[0][view], rows[1][view]) for view in VIEWS)
    assert likelihood.row_metadata(prepared) == {}


# --- policy, reference and sampler --------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [("sd15", torch.float32), ("sdxl_v", torch.float32), ("sdxl", torch.bfloat16)],
)
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_before_the_first_step_every_ratio_is_exactly_one(
    request, backbone, lora, reference, dtype
):
    model = load(request, backbone, lora=lora, reference=reference, dtype=dtype)
    likelihood = Transition()
    prepared = likelihood.prepare(model, shared_states())

    with torch.no_grad(), model.reference():
        reference_rows = likelihood.evaluate(model, prepared)
    policy_rows = likelihood.evaluate(model, prepared)

    for view in VIEWS:
        assert torch.equal(policy_rows[view], reference_rows[view])


def steps_of(trajectories, prompts):
    """All steps of all trajectories, as one view of a batch."""
    steps, rows = trajectories.log_likelihoods.shape
    t, t_next = torch.tensor(trajectories.times).repeat_interleave(rows, dim=0).unbind(dim=1)
    return StepBatch(
        sample_ids=tuple(str(i) for i in range(steps * rows)),
        states=trajectories.latents[:-1].flatten(0, 1),
        prompts=tuple(prompts) * steps,
        t=t,
        t_next=t_next,
        state_rows={"chosen": torch.arange(steps * rows)},
        outcomes={"chosen": trajectories.latents[1:].flatten(0, 1)},
    )


@pytest.mark.parametrize(
    ("lora", "reference"),
    [(LoraSettings(rank=2), "adapter_off"), (None, "past_policy")],
    ids=["lora", "full"],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_at_the_sampling_weights_the_samplers_own_value_comes_back(
    request, backbone, lora, reference
):
    model = load(request, backbone, lora=lora, reference=reference)
    change(model)
    prompts = ["a red circle", "two cats"]
    for guidance in (1.0, 5.0):
        process = ReverseProcess(steps=4, guidance=guidance)
        trajectories = sample(
            model,
            process,
            prompts,
            start_seeds=[1, 2],
            step_seeds=lambda step: [10 * step + 3, 10 * step + 4],
        )
        batch = steps_of(trajectories, prompts)

        policy = evaluate(model, batch, process=process)["chosen"]
        with torch.no_grad(), model.reference():
            start = evaluate(model, batch, process=process)["chosen"]

        stored = trajectories.log_likelihoods.flatten()
        torch.testing.assert_close(policy, stored, rtol=0, atol=1e-5)
        assert (start - stored).abs().max() > 1e-3  # of other weights it would not be


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_on_cuda_every_ratio_starts_at_one_and_nothing_waits_for_the_device(
    tiny_sdxl, lora, reference, dtype
):
    model = SDXL(path=str(tiny_sdxl), lora=lora).load(
        device=torch.device("cuda"), compute_dtype=dtype, reference=reference
    )
    likelihood, batch = Transition(), shared_states()
    likelihood.evaluate(model, likelihood.prepare(model, batch))  # warm up

    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference_rows = likelihood.evaluate(model, prepared)
        policy_rows = likelihood.evaluate(model, prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for view in VIEWS:
        assert torch.equal(policy_rows[view], reference_rows[view])


# --- words --------------------------------------------------------------------------------------


def test_the_start_of_a_run_says_which_reduction_and_which_process():
    mean = Transition(process=ReverseProcess(steps=50, guidance=7.5, eta=0.5)).describe()
    total = Transition(reduction="sum").describe()

    assert "50 steps, guidance 7.5, eta 0.5" in mean
    assert "mean over the numbers of a latent, which published clip ranges presuppose" in mean
    assert "SUM over the numbers of a latent: N times the mean" in total


def test_published_settings_are_the_default():
    assert Transition() == Transition(process=ReverseProcess(), reduction="mean")
