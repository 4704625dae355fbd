"""`diffalign export` of vision-language runs: adapters and whole models, opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import export, train
from diffalign.jobs.export import ExportConfig
from diffalign.training.config import RunConfig
from tests.judged_responses import write_judged_responses
from tests.tiny_vlm import tiny_llava

RUN = """
output: unset
model: {kind: vlm, path: unset, lora: {rank: 2, alpha: 3}, projector: trained}
responses: {path: unset, kind: tests.judged_responses, workers: 0}
likelihood: {kind: tokens}
objective: {kind: dpo, beta: 0.1}
optimizer: {lr: 0.05}
training: {optimizer_steps: 2, samples_per_device: 3, log_every: 1, checkpoint_every: 1}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> dict[str, Path]:
    """A run that trained an adapter and the projector, and one that trained all weights."""
    folder = tmp_path_factory.mktemp("runs")
    template = folder / "template.yaml"
    template.write_text(RUN)
    responses = write_judged_responses(folder)
    for name, more in {"lora": [], "whole": ["model.lora=null"]}.items():
        places = [f"output={folder / name}", f"model.path={base}", f"responses.path={responses}"]
        train.run(config.load(RunConfig, template, [*places, *more]))
    return {name: folder / name for name in ("lora", "whole")}


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        return model.eval().float()(input_ids=ids).logits


def trained_model(run: Path, base: Path):
    if run.name == "whole":
        return AutoModelForImageTextToText.from_pretrained(run / "final")
    opened = AutoModelForImageTextToText.from_pretrained(base)
    return PeftModel.from_pretrained(opened, run / "final")


@pytest.mark.parametrize("name", ["lora", "whole"])
@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_whole_model_says_what_was_trained(name, what, runs, base, tmp_path):
    source = runs[name] if what == "run" else runs[name] / "checkpoint-2"
    folder = export.run(ExportConfig(run=source, form="folder", output=tmp_path / "whole"))
    opened = AutoModelForImageTextToText.from_pretrained(folder)
    expected = logits(trained_model(runs[name], base))
    torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        expected, logits(AutoModelForImageTextToText.from_pretrained(base)), atol=1e-2
    )
    AutoProcessor.from_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "image-text-to-text",
    )


def test_an_adapter_is_what_peft_opens_in_the_chosen_dtype(runs, base):
    folder = export.run(ExportConfig(run=runs["lora"] / "checkpoint-2", dtype="bf16"))
    assert folder == runs["lora"] / "export/lora-2_peft"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    opened = AutoModelForImageTextToText.from_pretrained(base)
    adapted = PeftModel.from_pretrained(opened, folder)
    expected = logits(trained_model(runs["lora"], base))
    torch.testing.assert_close(logits(adapted), expected, rtol=0.05, atol=0.05)
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"


def test_what_a_form_cannot_hold_is_refused_in_a_sentence(runs, tmp_path):
    refused = {
        "form is kohya, which is for image models": {"run": runs["lora"], "form": "kohya"},
        "holds Stable Diffusion models": {"run": runs["lora"], "form": "single_file"},
        "no low-rank adapter holds: use form=folder$": {"run": runs["whole"], "form": "peft"},
    }
    for message, settings in refused.items():
        with pytest.raises(ConfigError, match=message):
            export.run(ExportConfig(**settings, output=tmp_path / "nothing"))
