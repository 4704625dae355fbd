from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.generation.models import (
    ModelSpec,
    SamplerConfig,
    TextToImage,
    choose_dtype,
    locate_model,
    sampler_settings,
)
from diffalign.models.adapter_files import ADAPTER_FILE

CPU = torch.device("cpu")
TEXTS, SEEDS = ["a cat", "a dog", "a cat", "two owls"], [0, 0, 1, 5]


def open_model(path: Path | ModelSpec, **sampler) -> TextToImage:
    spec = path if isinstance(path, ModelSpec) else ModelSpec(path=str(path))
    settings = SamplerConfig(**{"steps": 2, **sampler})
    return TextToImage.open(locate_model(spec), settings, device=CPU, dtype=torch.float32)


def change_weights(folder: Path, *, component: str = "unet", by: float = 0.05) -> None:
    """Move every tensor of a component a little."""
    (file,) = (folder / component).glob("*.safetensors")
    torch.manual_seed(0)
    moved = {name: t + by * torch.randn_like(t) for name, t in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})


@pytest.fixture
def moved_sdxl(tiny_sdxl, tmp_path) -> Path:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "moved"))
    change_weights(folder)
    return folder


@pytest.fixture
def adapter(tiny_sdxl, tmp_path) -> Path:
    """A folder with a LoRA for the tiny SDXL, every matrix random."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    inject_adapter_in_model(config, pipeline.unet)
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "adapter"
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        ("tiny_sd15", {}),
        ("tiny_sdxl", {}),
        ("tiny_sdxl", {"guidance": 1.0}),
        ("tiny_sdxl", {"scheduler": "DDIM", "eta": 1.0}),
        ("tiny_sdxl", {"scheduler": "EulerAncestralDiscreteScheduler"}),
    ],
)
def test_a_image_does_not_depend_on_its_batch(request, family, sampler):
    artist = open_model(request.getfixturevalue(family), **sampler)
    together = artist.generate(TEXTS, SEEDS)
    assert together.shape == (4, 3, 32, 32)
    assert together.abs().max() <= 1
    alone = [artist.generate([text], [seed])[0] for text, seed in zip(TEXTS, SEEDS, strict=True)]
    reverse = artist.generate(TEXTS[::-1], SEEDS[::-1]).flip(0)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(together, reverse, atol=1e-4, rtol=0)


def test_seed_and_prompt_both_change_the_noise(tiny_sdxl):
    noise = starting_noise(open_model(tiny_sdxl), ["a", "a", "b", "a"], [0, 1, 0, 0])
    assert torch.equal(noise[0], noise[3])
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    assert (noise[0] - noise[2]).abs().mean() > 0.5
    assert noise.std() == pytest.approx(1.0, abs=0.15)


def test_every_model_starts_from_the_same_noise(tiny_sdxl, tiny_sd15, moved_sdxl):
    first, *others = (
        starting_noise(open_model(path), TEXTS, SEEDS)
        for path in (tiny_sdxl, tiny_sd15, moved_sdxl)
    )
    assert all(torch.equal(first, other) for other in others)


def starting_noise(artist: TextToImage, texts: list[str], seeds: list[int]) -> Tensor:
    """What the pipeline is given as latents."""
    given = []
    real = artist.pipeline.prepare_latents

    def spy(*arguments):
        given.append(arguments[-1].clone())
        return real(*arguments)

    artist.pipeline.prepare_latents = spy
    artist.generate(texts, seeds)
    return given[0]


@pytest.mark.parametrize(
    ("family", "pipeline_class"),
    [("tiny_sd15", StableDiffusionPipeline), ("tiny_sdxl", StableDiffusionXLPipeline)],
)
@pytest.mark.parametrize(
    "sampler", [{}, {"guidance": 1.0}, {"negative_prompt": "ugly"}, {"height": 48, "width": 32}]
)
def test_images_are_those_of_the_plain_pipeline(request, family, pipeline_class, sampler):
    folder = request.getfixturevalue(family)
    artist = open_model(folder, **sampler)
    plain = pipeline_class.from_pretrained(folder)
    latents = starting_noise(artist, TEXTS, SEEDS)
    negative = sampler.get("negative_prompt")
    expected = plain(
        prompt=TEXTS,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=sampler.get("guidance", 5.0),
        negative_prompt=None if negative is None else [negative] * len(TEXTS),
        height=sampler.get("height"),
        width=sampler.get("width"),
        output_type="pt",
    ).images
    torch.testing.assert_close(artist.generate(TEXTS, SEEDS), 2 * expected - 1, atol=1e-4, rtol=0)


def test_each_prompt_is_encoded_once_while_its_images_stand_together(tiny_sdxl):
    artist = open_model(tiny_sdxl)
    encoded = []
    real = artist.pipeline.encode_prompt

    def spy(prompt, **rest):
        encoded.extend(prompt or [])  # the pipeline asks again, with embeddings and no prompt
        return real(prompt, **rest)

    artist.pipeline.encode_prompt = spy
    artist.generate(["a", "a"], [0, 1])
    artist.generate(["a", "b"], [2, 0])
    artist.generate(["b", "b"], [1, 2])
    assert encoded == ["a", "b"]


def test_neither_watermark_nor_safety_checker(tiny_sdxl, tiny_sd15):
    assert open_model(tiny_sdxl).pipeline.watermark is None
    assert open_model(tiny_sd15).pipeline.safety_checker is None


def test_a_named_scheduler_keeps_the_models_own_noise_schedule(tiny_sdxl):
    own = open_model(tiny_sdxl).pipeline.scheduler
    other = open_model(tiny_sdxl, scheduler="DPMSolverMultistep").pipeline.scheduler
    assert isinstance(other, diffusers.DPMSolverMultistepScheduler)
    assert other.config.beta_end == own.config.beta_end


def test_an_unknown_scheduler_is_refused_with_the_nearest(tiny_sdxl):
    with pytest.raises(
        ConfigError, match=r"'EulerDescrete' is no sampler .* Did you mean EulerDiscrete\?"
    ):
        open_model(tiny_sdxl, scheduler="EulerDescrete")


def test_prompts_that_are_cut_are_known(tiny_sdxl):
    artist = open_model(tiny_sdxl)
    assert artist.truncated(["ab", "a very long prompt"]) == ["a very long prompt"]


@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_an_adapter_is_found_wherever_it_lies(tiny_sdxl, adapter, tmp_path, form):
    if form == "run":
        run = tmp_path / "run"
        shutil.copytree(adapter, run / "final")
        config = {"model": {"kind": "sdxl", "path": str(tiny_sdxl), "revision": None}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        spec = ModelSpec(path=str(run))
    else:
        lora = adapter if form == "folder" else next(adapter.glob("*.safetensors"))
        spec = ModelSpec(path=str(tiny_sdxl), lora=lora)
    generated = open_model(spec).generate(TEXTS, SEEDS)

    plain = open_model(tiny_sdxl)
    assert (generated - plain.generate(TEXTS, SEEDS)).abs().max() > 1e-3
    # The file is named since diffusers 0.33 looks for none where the network is off.
    plain.pipeline.load_lora_weights(str(adapter), weight_name=ADAPTER_FILE)
    torch.testing.assert_close(generated, plain.generate(TEXTS, SEEDS), atol=1e-3, rtol=0)


def test_an_adapter_is_generated_with_the_prediction_type_that_its_run_trained(
    tiny_sdxl, adapter, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "final")
    model = {"kind": "sdxl", "path": str(tiny_sdxl), "prediction_type": "v_prediction"}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    spec, plain = (
        ModelSpec(path=str(run)),
        ModelSpec(path=str(tiny_sdxl), lora=adapter),
    )

    pipeline = open_model(spec, scheduler="DDIM").pipeline

    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert locate_model(spec).fingerprint() != locate_model(plain).fingerprint()


def test_damaged_weights_become_a_sentence(moved_sdxl):
    (moved_sdxl / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be opened as a pipeline"):
        open_model(moved_sdxl)


def test_in_half_precision_an_adapter_stays_separate(tiny_sdxl, adapter):
    model = locate_model(ModelSpec(path=str(tiny_sdxl), lora=adapter))
    artist = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.bfloat16)
    assert any("lora_A" in name for name, _ in artist.pipeline.unet.named_parameters())
    assert artist.generate(["a"], [0]).isfinite().all()


def test_the_result_of_a_full_run_is_generated_with(moved_sdxl, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(moved_sdxl, run / "final")
    (run / "config.yaml").write_text("model: {kind: sdxl, path: elsewhere}\n")
    expected = open_model(moved_sdxl).generate(["a"], [0])
    assert torch.equal(open_model(run).generate(["a"], [0]), expected)


def test_fingerprints_follow_the_weights_and_not_the_place(
    tiny_sdxl, tiny_sdxl_v, adapter, tmp_path
):
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    base = ModelSpec(path=str(tiny_sdxl))

    def fingerprint(spec: ModelSpec) -> str:
        return locate_model(spec).fingerprint()

    assert fingerprint(ModelSpec(path=str(copy))) == fingerprint(base)
    others = [
        fingerprint(ModelSpec(path=str(tiny_sdxl_v))),
        fingerprint(ModelSpec(path=str(tiny_sdxl), lora=adapter)),
    ]
    for component in ("unet", "text_encoder_2", "vae"):
        change_weights(copy, component=component)
        others.append(fingerprint(ModelSpec(path=str(copy))))
    assert len({fingerprint(base), *others}) == 6


@pytest.mark.parametrize(
    ("files", "lora", "message"),
    [
        (["config.yaml"], None, "neither finished nor saved a checkpoint.*--resume"),
        (["pytorch_lora_weights.safetensors"], None, "is an adapter: give it as lora"),
        (["unet/config.json"], None, "has no model_index.json"),
        (["lora.bin"], "lora.bin", "read from .safetensors only, never from pickles"),
        ([], "nowhere.safetensors", "there is no such adapter"),
        (["l/a.safetensors", "l/b.safetensors"], "l", "found a.safetensors, b.safetensors"),
    ],
)
def test_what_is_no_model_is_refused_with_advice(tmp_path, files, lora, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}" if name.endswith(".json") else "")
    with pytest.raises(ModelError, match=message):
        locate_model(ModelSpec(path=str(tmp_path), lora=lora and tmp_path / lora))


def test_an_adapter_of_another_model_is_refused(tiny_sdxl, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"text_encoder_7.layer.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match=r"other\.safetensors"):
        open_model(ModelSpec(path=str(tiny_sdxl), lora=file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eta": 2.0}, "eta must be between 0 and 1"),
        ({"height": 500}, "height must be a multiple of 8 pixels, got 500"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**arguments)


def test_settings_say_the_precision_that_was_chosen():
    dtype = choose_dtype("auto", CPU)
    assert sampler_settings(SamplerConfig(), dtype)["dtype"] == "float32"
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert sampler_settings(SamplerConfig(), choose_dtype("bf16", CPU))["dtype"] == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["tiny_sd15", "tiny_sdxl"])
def test_a_gpu_in_half_precision_generates_the_same_images(request, family):
    folder, cuda = request.getfixturevalue(family), torch.device("cuda")
    sampler = SamplerConfig(steps=2, scheduler="DDIM", eta=1.0)
    model = locate_model(ModelSpec(path=str(folder)))
    generated = TextToImage.open(model, sampler, device=cuda, dtype=torch.float16).generate(
        TEXTS, SEEDS
    )
    expected = open_model(folder, scheduler="DDIM", eta=1.0).generate(TEXTS, SEEDS)
    torch.testing.assert_close(generated, expected, atol=0.05, rtol=0)
