"""A Stable Diffusion 3 through the train job and back: two steps, export, pipeline, images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import generate, train
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.models.diffusion.sd3 import SD3
from diffalign.seeding import cpu_generator, derive_seed
from diffalign.timesteps import ResolutionShift
from diffalign.training.config import RunConfig
from tests import layouts
from tests.runs import figures
from tests.tiny_models import write_sd3

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = CONFIGS / "smoke/diffusion_dpo_sdxl.yaml"
TIMES = "likelihood.timesteps={distribution: logit_normal, shift: 3}"
OBJECTIVES = {
    "dpo": "objective={kind: dpo, beta: 100}",
    "ipo": "objective={kind: ipo, beta: 100}",
    "mapo": "objective={kind: mapo, beta: 0.1}",
}
TWICE = [
    pytest.param(name, shape, marks=[] if (name, shape) == ("dpo", "lora") else pytest.mark.slow)
    for name in OBJECTIVES
    for shape in ("lora", "full")
]


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    layouts.write_jsonl(folder, layouts.make_pairs(8))
    return folder


def run(model, data, output, *more, **options):
    settings = ["model.kind=sd3", f"model.path={model}", f"data.path={data}", f"output={output}"]
    settings += ["data.resolution=32", "optimizer.lr=1e-2", TIMES, *more]
    return train.run(config.load(RunConfig, SMOKE, settings), **options)


def by_the_pipeline(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a red thing", num_inference_steps=3, generator=generator, output_type="pt"
    ).images[0]


def images(model, output, *more):
    """What `diffalign generate` makes of one prompt."""
    settings = [f"models.m.path={model}", "prompts.texts=[a red thing]", "seeds=1", *more]
    settings += [f"output={output}", "sampler.steps=3", "sampler.guidance=4", "dtype=float32"]
    generate.run(config.load(generate.GenerateConfig, None, settings))
    return [Image.open(file).tobytes() for file in sorted(output.rglob("images/*/*.png"))]


@pytest.mark.parametrize(("objective", "shape"), TWICE)
def test_two_steps_end_in_what_the_pipeline_reads(tmp_path, tiny_sd3, data, objective, shape):
    more = ["model.lora=null"] if shape == "full" else []
    final = run(tiny_sd3, data, tmp_path / "run", OBJECTIVES[objective], *more)

    rows = figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    first = {"dpo": 0.6931472, "ipo": (0.5 / 100) ** 2}.get(objective)
    assert first is None or rows[0]["loss"] == pytest.approx(first, rel=1e-5)

    base = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    before = by_the_pipeline(base)
    if shape == "lora":
        base.load_lora_weights(final, weight_name=ADAPTER_FILE)
        after = by_the_pipeline(base)
    else:
        after = by_the_pipeline(StableDiffusion3Pipeline.from_pretrained(final))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("shape", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_generate_samples_what_the_pipeline_does_from_base_and_result(
    tmp_path, tiny_sd3, data, shape
):
    more = ["model.lora=null"] if shape == "full" else []
    final = run(tiny_sd3, data, tmp_path / "run", *more)
    base = images(tiny_sd3, tmp_path / "base")
    result = images(tmp_path / "run", tmp_path / "result")
    assert len(base) == len(result) == 1 and base != result

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    assert close(theirs(pipeline), base)
    if shape == "lora":
        pipeline.load_lora_weights(final, weight_name=ADAPTER_FILE)
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(final)
    assert close(theirs(pipeline), result)


def theirs(pipeline):
    """The image of the pipeline itself from the noise that `generate` begins with."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 4, 4, generator=cpu_generator(derive_seed("picture", "a red thing", 0)))
    found = pipeline(
        "a red thing",
        latents=noise[None],
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="pil",
    ).images[0]
    return found.tobytes()


def close(one, others):
    """Equal but for the rounding of the last bit of a pixel."""
    pairs = zip(one, others[0], strict=True)
    return max(abs(a - b) for a, b in pairs) <= 1


@pytest.mark.parametrize("method", ["d3po", "spo", "seppo"])
def test_online_methods_refuse_a_straight_path_before_weights_load(
    tmp_path, tiny_sd3, method, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(SD3, "load", load)
    settings = ["model.kind=sd3", f"model.path={tiny_sd3}", f"output={tmp_path / 'run'}"]
    settings += ["rollouts.scorer={kind: jpeg}"] if method == "spo" else []
    run_config = config.load(RunConfig, CONFIGS / f"playground/{method}.yaml", settings)
    with pytest.raises(ConfigError, match=r"straight path are deterministic and have no density"):
        train.run(run_config)


def test_an_inversion_of_a_straight_path_is_refused_before_weights_load(
    tmp_path, tiny_sd3, data, monkeypatch
):
    monkeypatch.setattr(SD3, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    settings = ["likelihood={kind: denoising, inversion: {}}"]
    with pytest.raises(ConfigError, match="this model follows a straight path"):
        run(tiny_sd3, data, tmp_path / "run", *settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.resolution=40"], r"data.resolution is 40: images of 40x40 .* multiples of 16"),
        (["data.buckets=true"], r"data.resolution is 32, and data.buckets is true: .* of 16"),
    ],
)
def test_images_that_the_patches_do_not_divide_are_refused_before_weights_load(
    tmp_path, tiny_sd3, data, more, message, monkeypatch
):
    monkeypatch.setattr(SD3, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(ConfigError, match=message):
        run(tiny_sd3, data, tmp_path / "run", *more)


def test_a_shift_by_resolution_reaches_the_samples(tmp_path, tiny_sd3, data):
    def losses(name, timesteps):
        run(tiny_sd3, data, tmp_path / name, f"likelihood.timesteps={timesteps}")
        return [row["loss"] for row in figures(tmp_path / name)]

    plain = losses("plain", "{}")
    line = losses("line", "{shift_by_resolution: {}}")
    number = losses("number", f"{{shift: {ResolutionShift().factor((32, 32))}}}")
    assert line[1] == number[1] != plain[1]
