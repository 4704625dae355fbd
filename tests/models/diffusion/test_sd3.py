"""Stable Diffusion 3 next to its own pipeline: prompts, encoders that are not there, training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffalign.errors import ModelError
from diffalign.likelihoods.denoising import Denoising
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.models.diffusion.noising import StraightPath
from diffalign.models.diffusion.sd3 import SD3, clip_widths
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.timesteps import TimestepSampling
from tests.tiny_models import WIDTH, write_sd3

PROMPTS = ["a red fox in the snow", "two teapots"]
ABSENT = [
    ("text_encoder_3",),
    ("text_encoder",),
    ("text_encoder_2",),
    ("text_encoder", "text_encoder_2"),
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
]


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("models") / "sd3")


def load(folder, *, reference="none", **settings):
    model = SD3(path=str(folder), **settings)
    model.check()
    return model.load(device=torch.device("cpu"), compute_dtype=torch.float32, reference=reference)


def zeros_of(width, tokens=16):
    """An encoder whose every vector is zero."""

    class Output(tuple):
        hidden_states = (None, torch.zeros(1, tokens, width), None)

    class Encoder:
        dtype = torch.float32

        def __call__(self, ids, output_hidden_states=False):
            output = Output((torch.zeros(len(ids), width),))
            output.hidden_states = (None, torch.zeros(len(ids), tokens, width), None)
            return output

    return Encoder()


@torch.no_grad()
def by_the_pipeline(folder, without=()):
    """What diffusers makes of the prompts; a CLIP encoder that is left out is one of zeros there,
    since the pipeline opens no such gap."""
    gone = {name: None for name in without if name == "text_encoder_3"}
    gone |= {name.replace("text_encoder", "tokenizer"): None for name in gone}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **gone)
    for name in set(without) - {"text_encoder_3"}:
        width = getattr(pipeline, name).config.hidden_size
        pipeline.register_modules(**{name: None})
        object.__setattr__(pipeline, name, zeros_of(width))
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, device="cpu")
    return hidden, pooled


@pytest.mark.parametrize("without", [(), *ABSENT], ids=lambda names: "+".join(names) or "all")
def test_prompts_are_encoded_as_the_pipeline_does(tiny_sd3, tmp_path, without):
    folder = tiny_sd3 if not without else write_sd3(tmp_path / "model", without=without)
    embeddings = load(folder).prompts.encode(PROMPTS)

    if set(without) >= {"text_encoder", "text_encoder_2"}:
        # 77 tokens where no tokenizer says otherwise
        assert not embeddings.hidden_states[:, :77].any() and not embeddings.pooled.any()
        assert embeddings.hidden_states.shape == (2, 77 + 256, 4 * WIDTH)
        assert embeddings.hidden_states.any() == ("text_encoder_3" not in without)
        return
    hidden, pooled = by_the_pipeline(tiny_sd3, without)
    torch.testing.assert_close(embeddings.hidden_states, hidden, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(embeddings.pooled, pooled, atol=1e-6, rtol=1e-6)
    assert hidden[0].ne(hidden[1]).any()


def test_the_width_of_a_missing_encoder_is_what_the_network_leaves_for_it():
    network = {"pooled_projection_dim": 2048}
    clip_l, clip_g = {"projection_dim": 768}, {"projection_dim": 1280}
    both = {"text_encoder": 768, "text_encoder_2": 1280}
    assert clip_widths(network, {"text_encoder": clip_l, "text_encoder_2": clip_g}) == both
    assert clip_widths(network, {"text_encoder": clip_l}) == both
    assert clip_widths(network, {"text_encoder_2": clip_g}) == both
    assert sum(clip_widths(network, {}).values()) == 2048
    with pytest.raises(ModelError, match="write pooled vectors of width 1536"):
        clip_widths(network, {"text_encoder": clip_l, "text_encoder_2": clip_l})


def test_the_noise_process_is_the_straight_path(tiny_sd3):
    noising = SD3(path=str(tiny_sd3)).noising()
    assert isinstance(noising, StraightPath) and noising.schedule_length == 1000


def test_another_kind_is_told_which_one_trains_the_folder(tiny_sd3):
    with pytest.raises(ModelError, match=r"holds a StableDiffusion3Pipeline.*: set kind to sd3"):
        SD15(path=str(tiny_sd3)).check()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer", {"pooled_projection_dim": 17}, "pooled_projection_dim 17"),
        ("transformer", {"joint_attention_dim": 16}, "text_encoder_3 writes vectors of width 32"),
        ("transformer", {"sample_size": None}, "sample_size None"),
        ("transformer", {"in_channels": 16}, "transformer/config.json has in_channels 16"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "is called in another way"),
        ("text_encoder", {"hidden_size": 64}, "are 74 wide together"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights(
    tiny_sd3, tmp_path, file, changes, message
):
    folder = shutil.copytree(tiny_sd3, tmp_path / "model")
    path = folder / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        SD3(path=str(folder)).check()


@pytest.mark.parametrize("reference", ["adapter_off", "frozen_copy"])
def test_policy_and_reference_begin_equal(tiny_sd3, make_pairs, reference):
    lora = LoraSettings(rank=2) if reference == "adapter_off" else None
    model = load(tiny_sd3, reference=reference, lora=lora)
    noisy, t = torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0])
    conditioning = model.prompts.framed(PROMPTS, None)
    with torch.no_grad():
        policy = model.predict(noisy, t, conditioning)
        with model.reference():
            assert torch.equal(model.predict(noisy, t, conditioning), policy)
        for _, parameter in model.trained_parameters():
            parameter.add_(0.05)
        moved = model.predict(noisy, t, conditioning)
        assert not torch.allclose(moved, policy, atol=1e-3)
        with model.reference():
            assert torch.equal(model.predict(noisy, t, conditioning), policy)


def test_the_adapter_lies_on_the_attention_of_image_and_text(tiny_sd3):
    model = load(tiny_sd3, lora=LoraSettings(rank=2))
    layers = {name.split(".lora_")[0] for name, _ in model.trained_parameters()}
    first = "transformer_blocks.0.attn."
    for name in ("to_q", "to_out.0", "add_k_proj", "to_add_out"):
        assert f"{first}{name}" in layers
    assert "transformer_blocks.0.attn2.to_q" in layers
    assert not any("ff" in name or "norm" in name for name in layers)


def gradients(folder, **settings):
    model = load(folder, **settings)
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 4, 4, generator=generator)
    conditioning = model.prompts.framed(PROMPTS, None)
    model.predict(noisy, torch.tensor([10.0, 900.0]), conditioning).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.trained_parameters()}


def test_gradient_checkpointing_changes_no_gradient(tiny_sd3):
    plain, saved = gradients(tiny_sd3), gradients(tiny_sd3, gradient_checkpointing=True)
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        if gradient is None:  # what the last block does with text has no part in the output
            assert saved[name] is None
        else:
            torch.testing.assert_close(saved[name], gradient)


def test_fused_attention_is_what_the_network_has_anyway(tiny_sd3):
    plain, fused = gradients(tiny_sd3), gradients(tiny_sd3, attention="sdpa")
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(plain[name], fused[name]) and plain[name].any()


@pytest.mark.parametrize("without", [(), ("text_encoder_3",)])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
def test_an_export_is_read_by_the_pipeline(tmp_path, without, lora):
    folder = write_sd3(tmp_path / "model", without=without)
    model = load(folder, lora=lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.export(tmp_path / "final")

    gone = dict.fromkeys(without)
    gone |= {name.replace("text_encoder", "tokenizer"): None for name in without}
    opened = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "final" if lora is None else folder, **gone
    )
    if lora is not None:
        opened.load_lora_weights(tmp_path / "final", weight_name=ADAPTER_FILE)
        assert not (tmp_path / "final" / "kohya_lora.safetensors").exists()
    base = StableDiffusion3Pipeline.from_pretrained(folder, **gone)
    noisy, t = torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0])
    conditioning = model.prompts.framed(PROMPTS, None)
    with torch.no_grad():
        ours = model.predict(noisy, t, conditioning)
        theirs = opened.transformer(noisy, timestep=t, **conditioning).sample
        before = base.transformer(noisy, timestep=t, **conditioning).sample
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)


def test_a_shift_by_resolution_is_told_to_the_scheduler(tmp_path, tiny_sd3):
    assert SD3(path=str(tiny_sd3)).schedule_arguments((4, 64, 64)) == {}
    settings = SD3(path=str(write_sd3(tmp_path / "model", shift=1.0, use_dynamic_shifting=True)))
    mu = settings.schedule_arguments((4, 128, 128))
    assert mu == {"mu": pytest.approx(1.15)}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **mu)
    assert scheduler.sigmas[:4].tolist() == pytest.approx(
        [1, 0.904530766739, 0.759510916949, 0.512844101509], abs=1e-6
    )


def test_only_times_of_a_straight_path_are_shifted(tiny_sdxl, tiny_sd3):
    moved = Denoising(timesteps=TimestepSampling(shift=3.0))
    moved.check(SD3(path=str(tiny_sd3)))
    with pytest.raises(ValueError, match="this model has a beta schedule: leave shift out"):
        moved.check(SDXL(path=str(tiny_sdxl)))
