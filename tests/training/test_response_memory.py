"""What is planned of a step on responses, against what torch's own profiler counts of it."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForImageTextToText

from diffalign import config
from diffalign.data.batches import TokenBatch
from diffalign.errors import ConfigError, ModelError
from diffalign.models.simulation import META, simulated
from diffalign.models.vlm.blank import BlankVLM, without_weights
from diffalign.models.vlm.config import VLM
from diffalign.training.config import RunConfig
from diffalign.training.response_memory import blank_token_batch
from diffalign.training.step_memory import step_memory
from tests.runs import run_script
from tests.tiny_vlm import tiny_llava_next, tiny_qwen2_5_vl
from tests.training.test_step_memory import loaded, micro_batch, nbytes, of_step, peak_of

CONFIG = Path(__file__).parents[2] / "configs/playground/responses/dpo.yaml"
LLAVA = Path(__file__).parents[2] / "assets/playground/llava"
SIZE = ("responses.max_length=160", "training.samples_per_device=3")
FULL = "model.lora=null"
CHECKPOINTED = "model.gradient_checkpointing=true"
BF16 = "training.precision=bf16"


@cache
def saved(family: str, dtype: torch.dtype) -> str:
    """A model of real weights, in a precision."""
    folder = Path(mkdtemp())
    source = LLAVA if family == "llava" else tiny_qwen2_5_vl(Path(mkdtemp()))
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def run_of(family: str, dtype: torch.dtype, *overrides: str) -> RunConfig:
    path = f"model.path={saved(family, dtype)}"
    return config.load(RunConfig, CONFIG, [path, *SIZE, *overrides])


def real_batch(run: RunConfig) -> TokenBatch:
    """The batch that is planned with, of zeros."""
    blank = blank_token_batch(run)
    filled = {
        condition: {
            name: torch.zeros(value.shape) if value.device == META else value
            for name, value in inputs.items()
        }
        for condition, inputs in blank.image_inputs.items()
    }
    return dataclasses.replace(blank, image_inputs=filled)


def measured(run: RunConfig) -> int:
    """Peak of a micro-batch with real tensors, what stays included."""
    model, batch = loaded(run), real_batch(run)
    model = BlankVLM(cast(VLM, run.model)).ready(model)
    modules = [model.network]
    copy = getattr(model._reference, "network", None)
    modules += [copy] if copy is not None else []
    resident = nbytes(t for m in modules for t in [*m.parameters(), *m.buffers()])
    resident += nbytes(t for inputs in batch.image_inputs.values() for t in inputs.values())
    micro_batch(run, model, batch)  # kernels make some things once
    for parameter in model.network.parameters():
        parameter.grad = None
    return resident + peak_of(lambda: micro_batch(run, model, batch))


@pytest.mark.parametrize(
    ("family", "dtype", "overrides"),
    [
        ("llava", torch.float32, ()),
        ("llava", torch.float32, (FULL, CHECKPOINTED, "model.prefix=repeated")),
        ("llava", torch.bfloat16, (BF16, CHECKPOINTED)),
        ("llava", torch.bfloat16, (BF16, FULL)),
        ("llava", torch.bfloat16, (BF16, FULL, CHECKPOINTED, "responses.max_length=96")),
        ("qwen2_5_vl", torch.bfloat16, (BF16,)),
        ("qwen2_5_vl", torch.float32, (FULL, "likelihood.concatenated=false")),
    ],
)
def test_the_peak_of_a_step_is_within_a_seventh_of_what_torch_counts(family, dtype, overrides):
    run = run_of(family, dtype, *overrides)
    assert of_step(step_memory(run, device="cpu")) == pytest.approx(measured(run), rel=0.15)


def test_a_stream_in_half_precision_is_planned_with_half_of_what_checkpointing_keeps():
    most = ("model.positions_at_once=1", BF16, CHECKPOINTED)
    whole, half = (
        step_memory(run_of("llava", dtype, *most), device="cuda").phases["policy"]["activations"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half < 0.8 * whole


def test_weights_of_few_bits_a_copy_and_pages_are_counted():
    def parts(*overrides: str, phase: str = "update") -> dict[str, int]:
        run = run_of("llava", torch.bfloat16, BF16, *overrides)
        return dict(step_memory(run, device="cuda").phases[phase])

    plain, few = parts(), parts("model.quantization=4bit")
    language = 3 * (4 * 128 * 128 + 3 * 128 * 384)  # parameters of its layers
    saves = language * (2 - 0.5 - 1 / 64)
    assert plain["base weights"] - few["base weights"] == pytest.approx(saves, rel=0.01)

    live = parts(FULL, phase="backward")
    assert live["reference copy"] > 0.4 * live["trained weights"]
    known = parts(FULL, "reference=cached", phase="backward")
    assert "reference copy" not in known

    adam, eight = parts(FULL), parts(FULL, "optimizer.kind=adamw_8bit")
    paged = parts(FULL, "optimizer.kind=paged_adamw_8bit")
    assert eight["optimiser state"] < 0.3 * adam["optimiser state"]
    assert paged["optimiser state"] == 0


def test_rounded_weights_are_not_kept_where_blocks_are_recomputed():
    few = ("responses.max_length=96", "training.samples_per_device=1", "reference=cached")
    kept, given_up = (
        step_memory(run_of("llava", torch.bfloat16, BF16, FULL, *few, *more), device="cuda")
        for more in ((), (CHECKPOINTED,))
    )
    rounded = kept.phases["policy"]["trained weights"] / 2
    difference = kept.phases["policy"]["activations"] - given_up.phases["policy"]["activations"]
    assert difference > 0.7 * rounded
    assert given_up.phases["policy"]["activations"] < rounded


def test_rows_that_share_their_prefix_are_planned_smaller():
    shared, repeated = (
        step_memory(run_of("llava", torch.float32, f"model.prefix={prefix}"), device="cuda")
        for prefix in ("shared", "repeated")
    )
    assert shared.work["policy"] < 0.95 * repeated.work["policy"]
    flash = run_of("llava", torch.float32, "model.attention=flash_attention_2")
    assert step_memory(flash, device="cuda").work == repeated.work


@pytest.mark.parametrize(
    ("tokens", "prefix", "samples", "longest"),
    [
        (10_000, "shared", 12, 160),  # all samples of a step, and room besides
        (470, "shared", 2, 157),  # 80 of image and prompt, 77 of each response: 234 a sample
        (720, "repeated", 3, 120),  # two rows a sample
    ],
)
def test_passes_cut_by_length_are_planned_as_full_as_they_may_be(tokens, prefix, samples, longest):
    cut = f"training.tokens_per_device={tokens}"
    run = run_of("llava", torch.float32, cut, f"model.prefix={prefix}", "training.accumulation=4")
    ids = blank_token_batch(run).responses["chosen"].input_ids
    assert tuple(ids.shape) == (samples, longest)


def test_a_blank_model_holds_what_a_loaded_one_holds():
    run: Any = run_of("qwen2_5_vl", torch.bfloat16, BF16)
    network = loaded(run).network
    with simulated("cuda"):
        blank = without_weights(run.model).load(
            device=META, compute_dtype=torch.bfloat16, reference="adapter_off"
        )
    there = {n: (p.shape, p.dtype, p.requires_grad) for n, p in network.named_parameters()}
    wanted = {n: (p.shape, p.dtype, p.requires_grad) for n, p in blank.network.named_parameters()}
    assert wanted == there


@pytest.mark.slow
def test_the_table_of_the_docs_can_be_made(capsys):
    run_script("plan_table.py", "--responses", "16gb:llava15_7b_qlora_16gb", "--folder", LLAVA)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| 16gb | llava15_7b_qlora_16gb | 4 x 512 |") and line.endswith(
        "| yes |"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [
        "16gb:llava15_7b_qlora_16gb",
        "80gb:llava15_7b_full_80gb",
        "16gb:qwen25_vl_7b_qlora_16gb",
        "24gb:qwen25_vl_7b_qlora_24gb",
        "80gb:qwen25_vl_7b_full_80gb",
    ],
)
def test_a_config_that_is_shipped_for_a_card_fits_it(entry, capsys):
    """Of the true size, without a weight."""
    run_script("plan_table.py", "--responses", entry)
    *_, line = capsys.readouterr().out.splitlines()
    card, _, name = entry.partition(":")
    assert line.startswith(f"| {card} | {name} |") and line.endswith("| yes |")


def test_what_needs_values_is_refused_in_a_sentence(monkeypatch):
    def needs_values(blank, model):
        raise NotImplementedError("aten::unique_consecutive: no kernel for tensors without values")

    monkeypatch.setattr(BlankVLM, "ready", needs_values)
    with pytest.raises(ConfigError, match=r"simulated by torch .*\(aten::.*take newer ones"):
        step_memory(run_of("llava", torch.float32), device="cpu")


def test_what_cannot_be_planned_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="leaves nothing for a response"):
        blank_token_batch(run_of("llava", torch.float32, "responses.max_length=40"))
    other = run_of("llava", torch.float32)
    folder = str(tiny_llava_next(Path(mkdtemp())))
    other = dataclasses.replace(other, model=VLM(path=folder))
    with pytest.raises(ModelError, match=r"families llava, qwen2_vl and .* is a llava_next"):
        blank_token_batch(other)
