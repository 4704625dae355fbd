"""Vision-language models: what trains, what is refused, what is written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import quantizers_utils

from diffalign.errors import ModelError
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.export import write_processor
from diffalign.training.optimizers.adamw import AdamW
from diffalign.training.optimizers.base import parameter_groups
from tests.responses import random_image, response_batch
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}
LORA = LoraSettings(rank=2, alpha=3)


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


def vlm(family: str = "llava", **settings: Any) -> VLM:
    return VLM(path=str(folder(family)), **{"lora": LORA, **settings})


def load(
    settings: VLM,
    reference: Any = "adapter_off",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **further: Any,
) -> Any:
    return settings.load(
        device=torch.device(device), compute_dtype=dtype, reference=reference, **further
    )


def altered(tmp_path: Path, name: str, **changes: Any) -> str:
    """A copy of the tiny LLaVA, one of whose JSON files says something else; None removes."""
    copy = tmp_path / "copy"
    shutil.copytree(folder("llava"), copy)
    content = json.loads((copy / name).read_text()) | changes
    (copy / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return str(copy)


def take_steps(model: Any, steps: int = 2) -> None:
    groups = parameter_groups(model.trained_parameters(), model.learning_rates())
    optimizer = AdamW(lr=1e-2).build(groups)
    batch = response_batch(model.processor)
    for _ in range(steps):
        likelihood = Tokens()
        policy = likelihood.evaluate(model, likelihood.prepare(model, batch))
        (policy["rejected"] - policy["chosen"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def scores(model: Any) -> Tensor:
    likelihood = Tokens()
    prepared = likelihood.prepare(model, response_batch(model.processor))
    with torch.no_grad():
        policy = likelihood.evaluate(model, prepared)
    return torch.stack([policy["chosen"], policy["rejected"]])


def plain_scores(model: Any, path: Path) -> Tensor:
    """The same sums from a model and a processor that transformers or peft opened."""
    batch = response_batch(AutoProcessor.from_pretrained(path))
    found = []
    for view in ("chosen", "rejected"):
        rows = batch.responses[view]
        with torch.no_grad():
            logits = model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                **rows.further,
                **batch.image_inputs[None],
            ).logits[:, :-1]
        own = logits.log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])[..., 0]
        found.append((own * rows.response_mask[:, 1:]).sum(1))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_sits_in_the_language_model_and_every_layer_of_it_has_one(family):
    settings = vlm(family)
    settings.check()
    model = load(settings)
    names = [name for name, _ in model.trained_parameters()]
    assert all(name.startswith("model.model.language_model.layers.") for name in names)
    adapted = {name.partition("_proj.lora_")[0].rpartition(".")[2] for name in names}
    assert adapted == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len(names) == 2 * 7 * 2  # factors, projections, layers
    next_to = {n for n, _ in model.network.named_parameters() if "visual" in n or "vision" in n}
    assert next_to and not any("lora" in name for name in next_to)


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, LORA) for family in FAMILIES), ("llava_next", None)]
)
def test_the_tower_is_the_same_bit_for_bit_after_steps_that_train_the_projector(family, lora):
    model = load(vlm(family, lora=lora, projector="trained"), "none")
    module_names = model.network.module_names
    before = {name: p.clone() for name, p in model.network.model.named_parameters()}
    take_steps(model)
    for name, parameter in model.network.model.named_parameters():
        projector = name.startswith(module_names.projector)
        if name.startswith(module_names.tower) and not projector:
            assert torch.equal(parameter, before[name]), name
        if projector:
            assert not torch.equal(parameter, before[name]), name
        if name.startswith(module_names.language) and parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name


def test_all_weights_train_only_where_the_settings_say_so():
    model = load(vlm(lora=None, tower="trained", projector="trained"), "frozen_copy")
    trained = {name for name, _ in model.trained_parameters()}
    assert trained == {name for name, _ in model.network.named_parameters()}
    model = load(vlm(lora=None), "frozen_copy")
    names = [name for name, _ in model.trained_parameters()]
    assert not any("vision_tower" in name or "projector" in name for name in names)


def test_a_frozen_copy_shares_what_never_trains():
    model = load(vlm(lora=None), "frozen_copy")
    with model.reference(), model.inference() as copied:
        pass
    assert copied is not model.network
    tower, language = "model.model.vision_tower", "model.lm_head.weight"
    for name, parameter in copied.named_parameters():
        own = model.network.get_parameter(name)
        if name.startswith(tower):
            assert parameter is own
        if name == language:
            assert parameter is not own and not parameter.requires_grad and own.requires_grad


def test_the_projector_learns_at_its_own_rate():
    model = load(vlm(projector="trained", projector_lr=2e-5))
    rates = model.learning_rates()
    assert set(rates.values()) == {2e-5}
    assert {name.rsplit(".", 2)[1] for name in rates} == {"linear_1", "linear_2"}
    assert load(vlm(projector="trained")).learning_rates() == {}


@pytest.mark.parametrize(
    ("family", "projector"),
    [("llava", "frozen"), ("llava_next", "trained"), ("qwen2_vl", "trained")],
)
def test_an_adapter_opens_in_peft_and_merged_in_transformers(family, projector, tmp_path):
    model = load(vlm(family, projector=projector, merge_on_export=True))
    start = scores(model)
    take_steps(model)
    expected = scores(model)
    model.export(tmp_path / "final")

    base = AutoModelForImageTextToText.from_pretrained(folder(family))
    opened = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    assert torch.allclose(plain_scores(opened, tmp_path / "final"), expected, atol=1e-4)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "final/merged").eval()
    assert torch.allclose(plain_scores(merged, tmp_path / "final/merged"), expected, atol=1e-4)
    assert (expected - start).abs().mean() > 0.1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_all_weights_open_in_transformers(family, tmp_path):
    model = load(vlm(family, lora=None, projector="trained"), "none")
    take_steps(model)
    model.export(tmp_path / "final")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final").eval()
    assert torch.allclose(plain_scores(opened, tmp_path / "final"), scores(model), atol=1e-4)


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_is_only_evaluated_takes_the_memory_of_what_is_frozen_and_says_the_same(lora):
    settings = vlm(lora=lora, projector="trained")
    trained = load(settings, "none", torch.bfloat16)
    evaluated = load(settings, "none", torch.bfloat16, trainable=False)
    assert not any(p.requires_grad for p in evaluated.network.parameters())
    layers = {
        name: module.weight.dtype
        for name, module in evaluated.network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }
    assert layers and set(layers.values()) == {torch.bfloat16}
    assert torch.equal(scores(evaluated), scores(trained))


def test_what_stayed_frozen_is_exported_as_the_base_has_it(tmp_path):
    model = load(vlm(lora=None), "none", torch.bfloat16)
    take_steps(model)
    model.export(tmp_path / "final")
    base = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    trained = dict(model.trained_parameters())
    for name, parameter in opened.named_parameters():
        source = trained.get(f"model.{name}", base.get_parameter(name))
        assert torch.equal(parameter, source), name


def test_a_projector_that_is_continued_keeps_its_float32_over_a_smaller_base(tmp_path):
    small = tmp_path / "small"
    shutil.copytree(folder("llava"), small)
    AutoModelForImageTextToText.from_pretrained(small).to(torch.bfloat16).save_pretrained(small)
    earlier = load(VLM(path=str(small), lora=LORA, projector="trained"))
    take_steps(earlier)
    earlier.export(tmp_path / "final")
    lora = LoraSettings(rank=2, alpha=3, start=tmp_path / "final")
    model = load(VLM(path=str(small), lora=lora, projector="trained"), "past_policy")
    for ours, theirs in zip(
        model.network.projector.parameters(), earlier.network.projector.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("projector", ["frozen", "trained"])
def test_an_adapter_is_continued_and_is_its_own_reference(projector, tmp_path):
    earlier = load(vlm(projector="trained"))
    take_steps(earlier)
    earlier.export(tmp_path / "final")
    lora = LoraSettings(rank=2, alpha=4, start=tmp_path / "final")  # of another scale
    settings = vlm(lora=lora, projector=projector)
    settings.check()
    model = load(settings, "past_policy")
    assert torch.allclose(scores(model), scores(earlier), atol=1e-4)
    with model.reference():
        assert torch.equal(scores(model), before := scores(model))
    take_steps(model)
    with model.reference():
        assert torch.equal(scores(model), before)


def test_the_values_that_are_exported_may_be_an_average(tmp_path):
    model = load(vlm())
    average = {name: torch.full_like(p, 0.5) for name, p in model.trained_parameters()}
    model.export(tmp_path / "final", average)
    base = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    opened = PeftModel.from_pretrained(base, tmp_path / "final")
    assert {float(p.mean()) for n, p in opened.named_parameters() if "lora_" in n} == {0.5}
    with pytest.raises(ValueError, match="must name every trained parameter"):
        model.export(tmp_path / "final", {})


def test_the_fingerprint_tells_bases_and_shapes_apart(tmp_path):
    def of(**settings: Any) -> str:
        return load(vlm(**settings), "none").fingerprint()

    assert of() == of(one_vision_pass=False, positions_at_once=7)
    others = [
        of(lora=LoraSettings(rank=3)),
        of(lora=None),
        of(projector="trained"),
        of(family="llava_next"),
    ]
    assert len({of(), *others}) == 5


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_responses_do_not_depend_on_company(family):
    model = load(vlm(family))
    image_inputs = [[random_image(i, size=(20, 12))] for i in range(2)]
    prompts = [
        model.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in ("Why?", "What is shown in this image?")
    ]
    together = model.generate(prompts, image_inputs, max_new_tokens=6)
    alone = [
        model.generate([prompt], [shown], max_new_tokens=6)[0]
        for prompt, shown in zip(prompts, image_inputs, strict=True)
    ]
    assert together == alone
    assert model.network.training


def test_responses_are_sampled_from_a_seed_and_never_hold_a_image():
    model = load(vlm())
    head = model.network.model.lm_head.weight
    with torch.no_grad():
        head[model.network.model.config.image_token_id] += 100.0 * head.abs().max()
    prompt = "USER: What? ASSISTANT:"
    state = torch.random.get_rng_state()
    sampled = [
        model.generate([prompt] * 3, [[]] * 3, max_new_tokens=8, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("<image>" in response for responses in sampled for response in responses)


def test_responses_are_the_most_probable_ones_whatever_the_checkpoint_asks_for():
    model = load(vlm())
    prompt = ["USER: What? ASSISTANT:"]
    plain = model.generate(prompt, [[]], max_new_tokens=8)
    model.network.model.generation_config.repetition_penalty = 100.0
    assert model.generate(prompt, [[]], max_new_tokens=8) == plain


def test_within_the_reference_it_is_the_reference_that_responses():
    model = load(vlm())
    prompt = ["USER: What? ASSISTANT:"]
    start = model.generate(prompt, [[]], max_new_tokens=8)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert model.generate(prompt, [[]], max_new_tokens=8) != start
    with model.reference():
        assert model.generate(prompt, [[]], max_new_tokens=8) == start


@pytest.mark.parametrize(
    "lacking", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]
)
def test_what_old_processors_lack_is_filled_in_from_the_model(tmp_path, lacking):
    path = altered(tmp_path, "processor_config.json", **{lacking: None})
    processor = VLM(path=path).processor()
    ids = processor(
        text="<image>", images=[random_image(0, size=(9, 9))], return_tensors="pt"
    ).input_ids[0]
    assert ids.tolist().count(processor.image_token_id) == 4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_images_are_scaled_down_to_a_number_of_pixels(family, tmp_path):
    def tokens(processor: Any) -> int:
        image_inputs = [random_image(0, size=(64, 64))]
        text = f"{processor.image_token} What is it?"
        ids = processor(text=text, images=image_inputs, return_tensors="pt")["input_ids"]
        return ids.tolist()[0].count(processor.image_token_id)

    plain, bounded = vlm(family), vlm(family, image_pixels=128)
    assert (tokens(plain.processor()), tokens(bounded.processor())) == (4, 1)
    assert plain.policy_fingerprint() != bounded.policy_fingerprint()
    load(bounded).export(tmp_path / "final")
    assert tokens(AutoProcessor.from_pretrained(tmp_path / "final")) == 1


def test_a_number_of_pixels_that_a_processor_cannot_keep_is_refused():
    with pytest.raises(ModelError, match="image_pixels is 128, but its processor brings"):
        vlm("llava", image_pixels=128).processor()
    with pytest.raises(ModelError, match="scales images up to 64 pixels at least"):
        vlm("qwen2_vl", image_pixels=32).processor()
    with pytest.raises(ValueError, match="image_pixels must be at least 1"):
        vlm("qwen2_vl", image_pixels=0)


def test_a_processor_that_counts_by_other_settings_is_left_alone(monkeypatch):
    settings = vlm()
    other = SimpleNamespace(vision_feature_select_strategy="full", num_image_tokens=729)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: other)
    assert settings.processor() is other


def test_a_path_may_start_from_the_home_folder(tmp_path, monkeypatch):
    altered(tmp_path, "config.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    VLM(path="~/copy").check()


def test_a_processor_that_counts_otherwise_is_refused(tmp_path):
    path = altered(tmp_path, "processor_config.json", patch_size=2)
    with pytest.raises(ModelError, match=r"patches of 2 and \+0, where the model has patches of 4"):
        VLM(path=path).check()
    shutil.rmtree(path)
    path = altered(tmp_path, "processor_config.json", num_additional_image_tokens=2)
    with pytest.raises(ModelError, match="counts other image tokens than its vision tower returns"):
        VLM(path=path).check()


def test_a_model_that_writes_nothing_about_images_is_refused(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a llama, which does not write text about images"):
        VLM(path=str(tmp_path)).check()


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    path = altered(tmp_path, "config.json", model_type="lava")
    with pytest.raises(ModelError, match=r"model_type 'lava'.*llava, llava_next, llava_one"):
        VLM(path=path).check()


def test_a_missing_folder_and_one_without_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no"):
        VLM(path=str(tmp_path / "missing")).check()
    path = altered(tmp_path, "config.json")
    (Path(path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        VLM(path=path).check()


def test_the_folder_of_an_adapter_is_told_from_that_of_a_model(tmp_path):
    load(vlm()).export(tmp_path / "final")
    with pytest.raises(
        ModelError, match=r"holds an adapter: set path to .*lora to \{rank: 2, start"
    ):
        VLM(path=str(tmp_path / "final")).check()
    with pytest.raises(ModelError, match=r"has no config\.json \(it holds: final\).*in .*final$"):
        VLM(path=str(tmp_path)).check()


def test_a_target_outside_the_language_model_is_refused():
    with pytest.raises(ModelError, match=r"'fc1'.*of model\.language_model \(there are: .*q_proj"):
        vlm(lora=LoraSettings(targets=("fc1",))).check()
    with pytest.raises(ModelError, match=r"'q_prj'.*Did you mean q_proj\?"):
        vlm(lora=LoraSettings(targets=("q_prj",))).check()


def test_settings_that_contradict_each_other_are_refused():
    for message, settings in {
        "set lora to null": {"tower": "trained"},
        "projector is frozen": {"projector_lr": 1e-5},
        "give lora a rank": {"quantization": "4bit", "lora": None},
        "lora is null: leave it out": {"merge_on_export": True, "lora": None},
        "positions_at_once must be at least 1": {"positions_at_once": 0},
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            vlm(**settings)


def test_few_bits_without_their_package_or_a_gpu_are_refused_before_weights(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'diffalign\[bitsandbytes\]'"):
        vlm(quantization="4bit").check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="quantization is 8bit, which needs a CUDA device"):
        vlm(quantization="8bit").check()


@pytest.mark.parametrize("family", FAMILIES)
def test_few_bits_are_for_the_language_model_alone(family, monkeypatch):
    if not hasattr(quantizers_utils, "should_convert_module"):
        pytest.skip("transformers below 5 has no function for its rule")
    model = load(vlm(family), "none").network.model  # peft looks for bitsandbytes the first time
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = vlm(family, quantization="4bit")
    options = settings._quantized(torch.device("cuda", 0), torch.float16)
    bits = options["quantization_config"]
    assert bits.bnb_4bit_compute_dtype == torch.float16
    layers = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    converted = {
        n for n in layers if quantizers_utils.should_convert_module(n, bits.llm_int8_skip_modules)
    }
    assert converted == {n for n in layers if n.startswith("model.language_model.")}


def test_logits_that_are_bounded_after_the_head_are_refused(monkeypatch):
    from transformers import LlavaForConditionalGeneration

    plain = LlavaForConditionalGeneration.forward

    def bounded(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", bounded)
    with pytest.raises(ModelError, match="bounds or scales its logits after its head"):
        load(vlm())


def test_recomputing_activations_is_silent():
    """A line at every report of a run would hide the reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        take_steps(load(vlm(gradient_checkpointing=True)), 1)


def test_an_adapter_that_is_to_be_off_must_be_there():
    with pytest.raises(ModelError, match="reference adapter_off needs an adapter"):
        load(vlm(lora=None), "adapter_off")
    going_on = LoraSettings(rank=4, start=Path("runs/first"))
    with pytest.raises(ModelError, match="the projector goes on from the one next to that adapter"):
        load(vlm(lora=going_on, projector="trained"), "adapter_off")


# --- on a GPU -----------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lora", "reference"), [(LORA, "adapter_off"), (None, "frozen_copy")])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_policy_and_reference_start_equal_and_the_policy_learns(
    family, lora, reference, dtype
):
    model = load(vlm(family, lora=lora), reference, dtype, device="cuda")
    likelihood = Tokens()
    prepared = likelihood.prepare(model, response_batch(model.processor))
    with torch.no_grad(), model.reference():
        before = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    assert all(torch.equal(policy[view], before[view]) for view in before)
    take_steps(model)
    with torch.no_grad(), model.reference():
        after = likelihood.evaluate(model, prepared)
    assert all(torch.equal(after[view], before[view]) for view in before)
    learnt = likelihood.evaluate(model, prepared)
    assert all(torch.isfinite(learnt[view]).all() for view in learnt)
    assert not torch.equal(learnt["chosen"], before["chosen"])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_on_cuda_an_adapter_learns_over_few_bits(bits):
    pytest.importorskip("bitsandbytes")
    model = load(vlm(quantization=bits), dtype=torch.bfloat16, device="cuda")
    layers = dict(model.network.model.named_modules())
    adapted = layers["model.language_model.layers.0.mlp.up_proj"].base_layer
    assert "bitsandbytes" in type(adapted).__module__
    tower = (m for n, m in layers.items() if "vision_tower" in n and isinstance(m, torch.nn.Linear))
    assert all(type(module) is torch.nn.Linear for module in tower)
    start = scores(model)
    take_steps(model)
    assert torch.isfinite(scores(model)).all() and not torch.equal(scores(model), start)


def test_a_processor_is_written_as_every_version_of_transformers_reads_it(tmp_path):
    tiny_llava(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")

    write_processor(tmp_path / "out", processor)

    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend"  # unknown before 5
    assert not isinstance(settings.get("extra_special_tokens"), list)  # a mapping before 5
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.tokenizer("a red cat").input_ids == processor.tokenizer("a red cat").input_ids


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    """transformers would begin with random numbers in their place, and only warn."""
    folder = tiny_llava(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layernorm" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a LlavaForConditionalGeneration"):
        VLM(path=str(folder)).load(
            device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
        )
