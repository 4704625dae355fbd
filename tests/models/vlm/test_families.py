"""Every family of `docs/models.md`, on tiny random models: it trains, one row serves the responses
of a sample, its tower runs once, and what is written opens in transformers and peft.

Prompts are longer than the windows and chunks of the models' layers. Numbers are compared with a
row for every response and the tower in every forward, and these with transformers' own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from diffalign.data.responses.chat import ChatEncoder
from diffalign.errors import ModelError
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.branches import Branches, prefix_obstacle
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.families import TESTED
from diffalign.models.vlm.quirks.base import AbstractFamily, family_of
from tests.likelihoods.test_prefix import MDPO, MIXED, assert_the_same, step
from tests.responses import response_batch
from tests.tiny_families import FAMILIES

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
TARGETS = {
    "qwen3_vl_moe": ATTENTION,
    "qwen3_5": ATTENTION | MLP | {"in_proj_qkv", "in_proj_z", "out_proj"},
}
"""Layers with an adapter where none are named; others have those of attention and MLP."""
REPEATED = {"qwen3_5"}
"""Whose responses have a row each."""
UNPACKED = {*REPEATED, "llama4", "paligemma2"}
"""Whose rows stand alone in a sequence."""
WITH_WINDOW = {"llava_mistral", "gemma3", "mistral3", "llama4", "paligemma2"}
WHOLE = ("qwen3_vl_moe", "gemma3", "idefics3", "mistral3", "llama4", "paligemma2")
"""Whose heads are tied to embeddings, or lie elsewhere than in LLaVA."""

OF_5 = ("qwen3_vl_moe", "idefics3", "smolvlm")
"""Whose half precision needs transformers 5."""

families = pytest.mark.parametrize("family", FAMILIES)


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


def load(family: str, reference: Any = "adapter_off", **changes: Any) -> Any:
    """A model that is not where it started."""
    known = {"lora": LoraSettings(rank=2), "positions_at_once": 7, **changes}
    model = VLM(path=str(folder(family)), **known).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference=reference
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def batch_of(family: str) -> Any:
    """Samples about one image, about none and about three, the first pair of each also next to
    noise."""
    return response_batch(VLM(path=str(folder(family))).processor(), *MDPO, image_counts=MIXED)


@cache
def plain(family: str) -> tuple[Any, Any, Tensor]:
    """One step with a row for every response and the tower in every forward."""
    model = load(family, prefix="repeated", one_vision_pass=False)
    return step(model, batch_of(family))


def of_transformers(family: str, model: Any) -> dict[str, Tensor]:
    """Log-probabilities of chosen and rejected, [n] each, from the forward of transformers."""
    batch, found = batch_of(family), {}
    model = family_of(model.config).repaired(model)
    for view in ("chosen", "rejected"):
        rows = batch.responses[view]
        further = dict(rows.further)
        if family.startswith("paligemma"):  # what its processor says where it is told a suffix
            further = {"token_type_ids": rows.response_mask.long()}
        images = dict(batch.image_inputs[None])
        images["pixel_values"] = images["pixel_values"].float()  # Llama 4's are bfloat16
        with torch.no_grad():
            logits = model(
                input_ids=rows.input_ids, attention_mask=rows.attention_mask, **further, **images
            ).logits[:, :-1]
        own = logits.log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])[..., 0]
        found[view] = (own * rows.response_mask[:, 1:]).sum(1)
    return found


def assert_close(ours: Any, theirs: Any) -> None:
    for view in theirs:
        assert torch.allclose(ours[view], theirs[view], rtol=1e-5, atol=1e-4), view


@families
def test_log_probabilities_are_those_of_transformers_and_images_matter(family):
    _, reference, _ = plain(family)
    model = AutoModelForImageTextToText.from_pretrained(folder(family)).eval()
    assert_close(reference, of_transformers(family, model))
    with_image, noisy = (reference[view] for view in ("chosen", "chosen@diffuse"))
    differ = (with_image - noisy).abs() > 1e-2
    assert differ.tolist() == [True, False, True]
    if family in WITH_WINDOW:
        known, rows = family_of(model.config), batch_of(family).responses["chosen"]
        shortest = (rows.response_mask.cumsum(1) == 0).sum(1).min()
        assert shortest > (known.window or known.chunk)


@families
def test_one_row_and_one_vision_pass_recomputed_or_not_give_the_same_losses_and_gradients(family):
    model = load(family)
    found = step(model, batch_of(family))
    assert_the_same(found, plain(family))
    assert model.shares_prefix == (family not in REPEATED)
    assert not model.remarks()
    rows = 2 * len(MIXED) if model.shares_prefix else 3 * len(MIXED)
    assert model.evaluations == 2 * rows

    model.network.zero_grad()
    model.network.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.network.model.enable_input_require_grads()
    calls: list[int] = []
    patches(model.network.tower).register_forward_hook(lambda *_: calls.append(1))
    assert_the_same(step(model, batch_of(family)), plain(family))
    assert len(calls) == 2, "once for the images, and once for the noisy ones"


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_in_one_sequence_give_the_same_losses_and_gradients(family, checkpointing):
    model = load(family)
    if checkpointing:
        model.network.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.network.model.enable_input_require_grads()
    packed = dataclasses.replace(batch_of(family), pack_to=10_000)
    found = step(model, packed)
    assert_the_same(found, plain(family))
    remarks = model.remarks()
    if family in UNPACKED:
        assert "rows are not packed" in remarks[0]
        return
    assert not remarks, "the comparison of the first batch found nothing"
    groups = Tokens().prepare(model, packed).groups
    assert max(map(len, groups)) == 1, "all rows of a group are one sequence"


@families
def test_half_precision_runs_and_is_close(family):
    if family in OF_5 and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 mixes precisions in it, or rounds where patches are")
    model = VLM(path=str(folder(family)), lora=LoraSettings(rank=2)).load(
        device=torch.device("cpu"), compute_dtype=torch.bfloat16, reference="adapter_off"
    )
    prepared = Tokens().prepare(model, batch_of(family))
    with torch.no_grad():
        found = Tokens().evaluate(model, prepared)
    assert not model.remarks()
    _, start, _ = plain(family)  # of the base
    for view, value in found.items():
        assert torch.allclose(value, start[view], rtol=0.02, atol=0.5), view


def patches(tower: Any) -> Any:
    """What makes embeddings of the patches of all images."""
    wanted = ("patch_embedding", "patch_embed", "patch_conv", "patch_embeddings")
    return next(m for name, m in tower.named_modules() if name.rpartition(".")[2] in wanted)


@families
def test_an_adapter_trains_the_language_model_alone_and_opens_in_peft(family, tmp_path):
    VLM(path=str(folder(family)), lora=LoraSettings(rank=2)).check()
    model = load(family, merge_on_export=family in ("llama4", "qwen3_vl_moe"))
    modules = model.network.module_names
    names = [name for name, _ in model.trained_parameters()]
    assert all(name.startswith(f"model.{modules.language}.") for name in names)
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    assert adapted == TARGETS.get(family, ATTENTION | MLP)

    frozen = {n: p.clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=1e-3)
    policy, _, _ = step(model, batch_of(family))
    optimizer.step()
    with torch.no_grad():
        prepared = Tokens().prepare(model, batch_of(family))
        trained = Tokens().evaluate(model, prepared)
    assert not torch.allclose(trained["chosen"], policy["chosen"])
    now = dict(model.network.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())

    model.export(tmp_path / "final")
    base = AutoModelForImageTextToText.from_pretrained(folder(family))
    opened: Any = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    assert_close(trained, of_transformers(family, opened.get_base_model()))
    if (tmp_path / "final/merged").is_dir():
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "final/merged").eval()
        assert_close(trained, of_transformers(family, merged))


@pytest.mark.parametrize("family", [family for family in WHOLE if family in FAMILIES])
def test_all_weights_train_and_open_in_transformers(family, tmp_path):
    model = load(family, "none", lora=None, projector="trained")
    tower = {n: p.clone() for n, p in model.network.tower.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=1e-4)
    prepared = Tokens().prepare(model, batch_of(family))
    policy = Tokens().evaluate(model, prepared)
    (policy["rejected"] - policy["chosen"]).mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = Tokens().evaluate(model, prepared)
    assert not torch.allclose(trained["chosen"], policy["chosen"])
    now = dict(model.network.tower.named_parameters())
    assert tower and all(torch.equal(now[name], before) for name, before in tower.items())
    model.export(tmp_path / "final")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final").eval()
    assert_close(trained, of_transformers(family, opened))


# --- what would be wrong in silence ---------------------------------------------------------------

MISTAKES = {
    "no window": ("window", ["gemma3", "mistral3", "llava_mistral", "paligemma2"]),
    "no chunks": ("chunk", ["llama4"]),
    "no blocks": ("blocks", ["gemma3", "paligemma"]),
    "window within blocks or around them": ("blocks_within_window", ["paligemma2"]),
    "window of the row": ("columns", ["gemma3", "mistral3", "paligemma2"]),
}


@pytest.mark.parametrize(
    ("mistake", "family"),
    [(m, family) for m, (_, of) in MISTAKES.items() for family in of if family in FAMILIES],
)
def test_a_mask_that_forgets_something_is_found_out_at_the_first_batch(
    mistake, family, monkeypatch
):
    what, _ = MISTAKES[mistake]
    if what == "columns":
        made = Branches.of

        def counted_on(model: Any, **known: Any) -> Branches:
            right = made(model, **known)
            wrong = torch.arange(right.segments.shape[1]).expand_as(right.segments)
            return Branches(**{**vars(right), "columns": wrong})

        monkeypatch.setattr(Branches, "of", counted_on)
    model = load(family)
    kind = type(model.family)
    if what == "blocks":
        monkeypatch.setattr(kind, "blocks", lambda self, inputs: None)
    elif what == "blocks_within_window":
        monkeypatch.setattr(kind, what, not kind.blocks_within_window)
    elif what != "columns":
        monkeypatch.setattr(kind, what, {"window": 10**6, "chunk": 10**6}[what])
    Tokens().prepare(model, batch_of(family))
    assert not model.prefix_agrees
    assert "as with model.prefix=repeated" in model.remarks()[0]


@pytest.mark.skipif("llama4" not in FAMILIES, reason="transformers does not have it")
@pytest.mark.parametrize("first_scaled", [64, 8192])
def test_rows_with_branches_end_before_attention_is_scaled(first_scaled, monkeypatch):
    model = load("llama4")
    monkeypatch.setattr(model.family.text, "floor_scale", first_scaled)
    prepared = Tokens().prepare(model, batch_of("llama4"))
    branched = any(rows.branches is not None for rows in prepared.groups)
    assert branched == (first_scaled == 8192)


@pytest.mark.skipif("paligemma" not in FAMILIES, reason="of transformers 5")
def test_questions_that_the_image_sees_are_not_shared():
    """Where tokens of a prompt see each other, two prompts have nothing in common."""
    model = load("paligemma")
    batch = batch_of("paligemma")
    prepared = Tokens().prepare(model, batch)
    assert any(rows.branches is not None for rows in prepared.groups)
    rejected = batch.responses["rejected"]
    other = rejected.input_ids.clone()
    place = int((rejected.response_mask[0].cumsum(0) == 0).sum()) - 3
    other[:, place] = other[:, place - 1]
    changed = {**vars(rejected), "input_ids": other}
    differing = type(batch)(
        **{**vars(batch), "responses": {**batch.responses, "rejected": type(rejected)(**changed)}}
    )
    prepared = Tokens().prepare(model, differing)
    assert all(rows.branches is None for rows in prepared.groups)


# --- what is said ---------------------------------------------------------------------------------


def test_a_family_without_a_chat_template_is_refused_with_the_way_out(tmp_path):
    shutil.copytree(folder("gemma3"), tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    processor = VLM(path=str(tmp_path / "model")).processor()
    with pytest.raises(ModelError, match=r"has no chat template.*chat_template\.jinja"):
        ChatEncoder(processor)


def test_layers_that_are_one_parameter_of_all_experts_are_refused_by_name():
    settings = VLM(path=str(folder("qwen3_vl_moe")), lora=LoraSettings(targets=("up_proj",)))
    with pytest.raises(ModelError, match=r"'up_proj'.*no linear.*layer of model\.language_model"):
        settings.check()


def test_the_page_lists_every_family_and_how_its_rows_are_computed():
    page = (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| family | `model_type` | rows |")
    lines = [line.split("|")[1:-1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    said = {kind.strip(" `"): rows.strip() for _, kind, rows, *_ in lines}
    whole = {kind.strip(" `") for _, kind, _, all_weights, _ in lines if all_weights.strip()}
    assert list(said) == list(TESTED)
    assert whole == {name.rstrip("2") for name in WHOLE} | {"llava", "qwen2_vl"}
    for family in FAMILIES:
        config = json.loads((folder(family) / "config.json").read_text())
        obstacle = prefix_obstacle(VLM(path=str(folder(family))).config, asked="auto", lora=None)
        expected = "shared" if obstacle is None else "repeated"
        assert said[config["model_type"]] == expected
        assert (expected == "repeated") == (family in REPEATED)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_know_whether_the_loaded_model_packs_rows(family):
    known = VLM(path=str(folder(family))).packing_obstacle
    assert (load(family).packs_up_to(100) is None) == (known is not None)
    assert (known is not None) == (family in UNPACKED)


def test_a_family_that_is_not_known_is_plain():
    config = VLM(path=str(folder("llava"))).config
    assert isinstance(family_of(config), AbstractFamily)
    assert family_of(config).name == "llava"
