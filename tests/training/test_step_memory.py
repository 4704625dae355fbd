"""What is planned against what torch's own profiler counts of the same step with real tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffalign import config
from diffalign.data.batches import ImageBatch
from diffalign.errors import ConfigError
from diffalign.models.devices import DTYPES
from diffalign.training import step_memory as planned
from diffalign.training.config import RunConfig
from diffalign.training.look_ahead import views_of
from diffalign.training.reference import resolve_reference
from diffalign.training.step_memory import StepMemory, step_memory

CONFIG = Path(__file__).parents[2] / "configs/playground/diffusion_dpo.yaml"
SIZE = ("data.resolution=128", "training.samples_per_device=4", "model.images_per_encoding=4")
LORA = "model.lora={rank: 16}"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def run_of(*overrides: str) -> RunConfig:
    return config.load(RunConfig, CONFIG, [*SIZE, *overrides])


def nbytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_of(function: Any) -> int:
    """Bytes that torch's allocator gave out and did not get back, at most, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def real_batch(run: RunConfig) -> ImageBatch:
    """The batch that is planned with, of zeros."""
    if not run.model.takes_encodings:
        blank = planned._blank_batch(run)
        images = {view: torch.zeros(value.shape) for view, value in blank.images.items()}
        return dataclasses.replace(blank, images=images)
    encodings = planned.blank_encodings(run)
    filled = dataclasses.replace(
        encodings,
        posteriors={
            v: torch.zeros(p.shape, dtype=p.dtype) for v, p in encodings.posteriors.items()
        },
        prompts={n: torch.zeros(p.shape, dtype=p.dtype) for n, p in encodings.prompts.items()},
    )
    return planned._blank_batch(run, filled)


def loaded(run: RunConfig) -> Any:
    """Its model, on the CPU."""
    return run.model.load(
        device=torch.device("cpu"),
        compute_dtype=DTYPES[run.training.precision],
        reference=resolve_reference(run),  # type: ignore[arg-type]
    )


def micro_batch(run: RunConfig, model: Any, batch: ImageBatch) -> None:
    """What the loop does with one, up to its gradients."""
    prepared = run.likelihood.prepare(model, batch)
    known: dict[str, Tensor] = {}
    if run.objective.needs_reference:
        with torch.no_grad(), model.reference():
            known = run.likelihood.evaluate(model, prepared)
    policy = run.likelihood.evaluate(model, prepared)
    run.objective(views_of(policy, known, {}, {})).loss.mean().backward()


def measured(run: RunConfig) -> int:
    """Peak of a micro-batch with real tensors, what stays included."""
    model = loaded(run)
    batch = real_batch(run)

    def step() -> None:
        micro_batch(run, model, batch)

    modules = [model.network]
    if batch.encodings is None:
        modules += [model.autoencoder.network, *model.prompts.conditioner.text_encoders]
    copy = getattr(model._reference, "network", None)
    modules += [copy] if copy is not None else []
    resident = nbytes(t for m in modules for t in [*m.parameters(), *m.buffers()])
    step()  # kernels make some things once
    for parameter in model.network.parameters():
        parameter.grad = None
    return resident + peak_of(step)


def of_step(memory: StepMemory) -> int:
    """What is planned for a micro-batch, without what the optimiser keeps."""
    totals = [
        sum(parts.values()) - parts.get("optimiser state", 0)
        for phase, parts in memory.phases.items()
        if phase != "update"
    ]
    return max(totals)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (LORA,),
        ("model.gradient_checkpointing=true",),
        (LORA, "model.gradient_checkpointing=true", "data.resolution=256"),
        (LORA, "training.precision=bf16"),
        ("training.precision=bf16", "training.samples_per_device=2"),
        ("model.images_per_encoding=32", LORA, "model.gradient_checkpointing=true"),
        (LORA, "model.encoders=cached"),
        ("model.encoders=cached", "model.posterior=mean", "training.precision=bf16"),
        pytest.param((LORA, "model.quantization=8bit"), marks=needs_bitsandbytes),
        pytest.param(
            (LORA, "model.quantization=4bit", "model.encoders=cached"), marks=needs_bitsandbytes
        ),
    ],
    ids=[
        *("full", "lora", "checkpointed", "both", "lora bf16", "full bf16", "encoding"),
        *("cached", "cached means", "8 bits", "4 bits"),
    ],
)
def test_the_peak_of_a_step_is_within_a_tenth_of_what_torch_counts(overrides):
    run: Any = run_of(*overrides)
    rel = 0.1 if run.model.quantization is None else 0.15
    assert of_step(step_memory(run, device="cpu")) == pytest.approx(measured(run), rel=rel)


@pytest.mark.slow
def test_parts_of_a_full_run_are_those_of_its_weights():
    run = run_of("data.resolution=64", "training.samples_per_device=1", "training.ema_decay=0.9")
    model: Any = run.model
    blank = model.parts.blank_network()
    weights = sum(4 * parameter.numel() for parameter in blank.parameters())
    parts = step_memory(run, device="cpu").phases["update"]
    for name in ("trained weights", "reference copy", "gradients", "weight average"):
        assert parts[name] == pytest.approx(weights, rel=1e-3), name
    assert parts["optimiser state"] == pytest.approx(2 * weights, rel=1e-2)


@pytest.mark.slow
def test_gradients_wait_for_the_next_micro_batch_only_where_there_is_one():
    once, twice = (
        step_memory(
            run_of("data.resolution=64", f"training.accumulation={count}"), device="cpu"
        ).phases["encode"]
        for count in (1, 2)
    )
    assert "gradients" not in once
    assert twice["gradients"] == twice["trained weights"]


@pytest.mark.slow
def test_autocast_of_cuda_keeps_normalised_values_in_float32():
    run = run_of(LORA, "training.precision=bf16", "data.resolution=64")
    cpu, cuda = (step_memory(run, device=device) for device in ("cpu", "cuda"))
    assert cuda.phases["policy"]["activations"] > 1.1 * cpu.phases["policy"]["activations"]


@pytest.mark.slow
def test_cached_encodings_need_neither_autoencoder_nor_text_encoders():
    small = ("data.resolution=64", "training.samples_per_device=2", LORA)
    resident = step_memory(run_of(*small), device="cpu").phases["policy"]
    cached = step_memory(run_of(*small, "model.encoders=cached"), device="cpu").phases["policy"]
    assert {"autoencoder", "text encoders"} <= resident.keys()
    assert not {"autoencoder", "text encoders"} & cached.keys()
    assert cached["activations"] == pytest.approx(resident["activations"], rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "samples from its model"),
    ],
)
def test_runs_that_are_not_planned_are_refused_in_a_sentence(change, message):
    with pytest.raises(ConfigError, match=message):
        step_memory(dataclasses.replace(run_of(), **change), device="cpu")


@pytest.mark.parametrize("more", [(), ("training.precision=bf16", "model.encoders=cached")])
def test_the_work_of_precompute_is_what_torch_counts_of_real_tensors(more):
    run = run_of("training.samples_per_device=1", *more)
    real = dataclasses.replace(run, model=dataclasses.replace(run.model, encoders="resident"))
    model: Any = real.model.load(
        device=torch.device("cpu"),
        compute_dtype=DTYPES[run.training.precision],
        reference="none",
        trainable=False,
    )
    batch = real_batch(real)
    prepared = run.likelihood.prepare(model, batch)

    def counted(function: Any, *given: Any) -> int:
        # As products of matrices: torch knows no count of every kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
            function(*given)
        return found.get_total_flops()

    work = planned.advance_work(run)
    assert 2 * work.image == counted(model.latents, batch) > 0
    assert work.caption == counted(model.conditioning, batch) > 0
    assert 2 * work.reference == counted(run.likelihood.evaluate, model, prepared) > 0


@pytest.mark.parametrize("lora", ["null", "{rank: 16}"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_work_of_a_step_is_what_torch_counts_of_real_tensors(lora, checkpointing):
    run = run_of(f"model.lora={lora}", f"model.gradient_checkpointing={checkpointing}")
    model, batch = loaded(run), real_batch(run)
    # As products of matrices: torch knows no count of every kernel of attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
        micro_batch(run, model, batch)
    work = step_memory(run, device="cpu").work
    assert sum(work.values()) == pytest.approx(found.get_total_flops(), rel=0.01)
    assert work["reference"] > 0 and work["update"] == 0
    assert work["backward"] > 0.5 * work["policy"]
