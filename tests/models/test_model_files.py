"""Every field of every configuration that is read: built, followed, of no matter here, or refused.

A field that is in none of the lists fails `test_every_field_is_decided`: decide what it means for
training and for sampling before a model that sets it is accepted in silence.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffalign.errors import ModelError
from diffalign.generation.models import ModelSpec, locate_model
from diffalign.generation.text_to_image import SamplerConfig, TextToImage, check_sampler
from diffalign.models.diffusion.autoencoder import LatentScaling
from diffalign.models.diffusion.schedulers import SCHEDULERS
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from tests.original_layout import write_single_file

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Refused:
    """Values of a field under which a model is not trained."""

    value: Any
    message: str


def named(fields: str) -> set[str]:
    return set(fields.split())


UNET_BUILT = named(
    """_class_name act_fn addition_embed_type_num_heads addition_time_embed_dim attention_head_dim
    block_out_channels center_input_sample class_embeddings_concat conv_in_kernel conv_out_kernel
    cross_attention_dim cross_attention_norm down_block_types downsample_padding
    dual_cross_attention encoder_hid_dim flip_sin_to_cos freq_shift layers_per_block
    mid_block_only_cross_attention
    mid_block_scale_factor mid_block_type norm_eps norm_num_groups num_attention_heads
    only_cross_attention resnet_out_scale_factor resnet_skip_time_act resnet_time_scale_shift
    reverse_transformer_layers_per_block time_embedding_act_fn time_embedding_dim
    time_embedding_type timestep_post_act transformer_layers_per_block up_block_types
    upcast_attention use_linear_projection"""
)
"""The network is made by them, and does itself what they say."""
UNET_NO_MATTER = {"dropout"}
"""Dropout of the base is off in policy and reference (docs/models.md)."""
UNET_REFUSED = [
    ("_class_name", Refused("UNet2DModel", "is of 'UNet2DModel'")),
    ("in_channels", Refused(9, "in_channels 9, .* a mask and an image to paint into")),
    ("in_channels", Refused(8, "in_channels 8, .* an image to be edited")),
    ("in_channels", Refused(7, "in_channels 7, .* a small image, as upscalers do")),
    ("in_channels", Refused(5, "in_channels 5, .* a depth map")),
    ("in_channels", Refused(16, "in_channels 16, .* not made for each other")),
    ("out_channels", Refused(8, "out_channels 8, .* predicts a variance")),
    ("out_channels", Refused(3, "out_channels 3, .* something else than the noise")),
    ("time_cond_proj_dim", Refused(256, "told the guidance scale")),
    ("class_embed_type", Refused("timestep", "told a class next to the prompt")),
    ("num_class_embeds", Refused(1000, "a class or a noise level, as upscalers do")),
    ("encoder_hid_dim_type", Refused("image_proj", "wants an image next to the prompt")),
    ("encoder_hid_dim_type", Refused("text_image_proj", "wants an image next to the prompt")),
    ("attention_type", Refused("gated", "boxes next to the prompt")),
    ("addition_embed_type", Refused(None, "addition_embed_type None, .* 'text_time'")),
    ("addition_embed_type", Refused("text", "addition_embed_type 'text'")),
    ("sample_size", Refused(None, "sample_size None: it must be the height and width")),
    ("cross_attention_dim", Refused(48, "cross_attention_dim 48, .* vectors of width 16")),
    ("encoder_hid_dim", Refused(48, "encoder_hid_dim 48, .* vectors of width 16")),
    ("projection_class_embeddings_input_dim", Refused(55, "dim 55, .* make 56: a refiner")),
    ("down_block_types", Refused(["NoBlock"], "describes no network")),
]
VAE_BUILT = named(
    """act_fn block_out_channels down_block_types layers_per_block mid_block_add_attention
    norm_num_groups up_block_types use_post_quant_conv use_quant_conv"""
)
VAE_FOLLOWED = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
VAE_NO_MATTER = {"sample_size"}
"""The size that it was trained at; it takes others."""
VAE_REFUSED = [
    ("_class_name", Refused("AutoencoderTiny", "is of 'AutoencoderTiny'")),
    ("in_channels", Refused(4, "in_channels 4: images have 3")),
    ("out_channels", Refused(4, "out_channels 4: images have 3")),
    ("latent_channels", Refused(16, "in_channels 4, .* latent_channels 16: they were not made")),
    ("scaling_factor", Refused(0, "scaling_factor 0: it must be a number above 0")),
    ("scaling_factor", Refused(None, "scaling_factor None")),
    ("shift_factor", Refused("a bit", "shift_factor 'a bit'")),
    ("latents_mean", Refused([0.1] * 4, "has one of latents_mean and latents_std")),
    ("latents_std", Refused([1.0] * 4, "has one of latents_mean and latents_std")),
]
SCHEDULER_FOLLOWED = named(
    """num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type
    rescale_betas_zero_snr timestep_spacing steps_offset"""
)
SCHEDULER_SWITCHED_OFF = {"clip_sample", "thresholding"}
SCHEDULER_REFUSED = {"variance_type", "timestep_type", "use_flow_sigmas"}
"""Values of these are refused: see test_schedulers.py."""
SCHEDULER_OF_ITS_SAMPLER = named(
    """algorithm_type clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio
    dynamic_shifting euler_at_final final_sigmas_type flow_shift interpolation_type
    lambda_min_clipped lower_order_final original_inference_steps predict_x0
    predictor_order sample_max_value
    set_alpha_to_one shift_terminal sigma_max sigma_min skip_prk_steps solver_order solver_p
    solver_type tau_func time_shift_type timestep_scaling use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas"""
)
"""How its own class takes its steps. Images of that class follow them; steps with a density
(`rollouts`) are DDIM's, which end at the first timestep, as with set_alpha_to_one false."""


def fields_of(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}


def test_every_field_is_decided():
    refused = {name for name, _ in UNET_REFUSED}
    assert fields_of(UNet2DConditionModel) <= UNET_BUILT | UNET_NO_MATTER | refused
    refused = {name for name, _ in VAE_REFUSED}
    assert fields_of(AutoencoderKL) <= VAE_BUILT | VAE_FOLLOWED | VAE_NO_MATTER | refused
    decided = SCHEDULER_FOLLOWED | SCHEDULER_SWITCHED_OFF | SCHEDULER_REFUSED
    for name in SCHEDULERS:
        fields = fields_of(getattr(diffusers, f"{name}Scheduler"))
        assert fields <= decided | SCHEDULER_OF_ITS_SAMPLER, name


@pytest.fixture
def change(tiny_sdxl, tmp_path) -> Callable[..., Path]:
    """Makes a copy of the tiny SDXL with fields of one of its files changed."""

    def changed(file: str, **fields: Any) -> Path:
        folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model", dirs_exist_ok=True))
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **fields}))
        return folder

    return changed


@pytest.mark.parametrize(("field", "refused"), UNET_REFUSED)
def test_a_denoiser_that_asks_for_more_is_refused_before_weights(change, field, refused):
    folder = change("unet/config.json", **{field: refused.value})
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()

    with pytest.raises(ModelError, match=refused.message):
        SDXL(path=str(folder)).check()


@pytest.mark.parametrize(("field", "refused"), VAE_REFUSED)
def test_an_autoencoder_that_is_not_followed_is_refused_in_training_and_sampling(
    change, field, refused
):
    folder = change("vae/config.json", **{field: refused.value})

    with pytest.raises(ModelError, match=refused.message):
        SDXL(path=str(folder)).check()
    with pytest.raises(ModelError, match=refused.message):
        locate_model(ModelSpec(path=str(folder)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean .* each of the 4"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1, 1, 0]}, "latents_std .* above 0"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            "both shift_factor and latents_mean",
        ),
    ],
)
def test_statistics_that_cannot_be_meant_are_refused(change, fields, message):
    with pytest.raises(ModelError, match=message):
        SDXL(path=str(change("vae/config.json", **fields))).check()


def test_another_autoencoder_is_checked_like_the_models_own(tiny_sdxl, tmp_path):
    other = Path(shutil.copytree(tiny_sdxl / "vae", tmp_path / "vae"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))

    with pytest.raises(ModelError, match=r"vae/config.json has latent_channels 16"):
        SDXL(path=str(tiny_sdxl), vae=str(other)).check()


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask True"),
        ("text_encoder/config.json", {"hidden_size": 12}, "write vectors of width 20"),
        ("text_encoder_2/config.json", {"projection_dim": 12}, "make 60: a refiner"),
        ("unet/config.json", {"in_channels": 9}, "in_channels 9"),
    ],
)
def test_parts_that_were_not_made_for_each_other_are_refused(change, file, fields, message):
    with pytest.raises(ModelError, match=message):
        SDXL(path=str(change(file, **fields))).check()


def test_sd15_refuses_what_only_sdxl_is_told(tiny_sd15, tmp_path):
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(
        json.dumps({**config, "addition_embed_type": "text_time"})
    )

    with pytest.raises(ModelError, match="addition_embed_type 'text_time'"):
        SD15(path=str(folder)).check()


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (
            "StableDiffusionXLInpaintPipeline",
            "a StableDiffusionXLInpaintPipeline, from which no images are",
        ),
        ("StableDiffusionXLInstructPix2PixPipeline", "from which no images are sampled"),
        ("FluxPipeline", "a FluxPipeline, from which no images are sampled"),
    ],
)
def test_pipelines_that_want_an_image_are_refused_before_they_sample(change, pipeline, message):
    with pytest.raises(ModelError, match=message):
        locate_model(ModelSpec(path=str(change("model_index.json", _class_name=pipeline))))


def sampled(folder: Path, **sampler: Any) -> torch.Tensor:
    model = locate_model(ModelSpec(path=str(folder)))
    opened = TextToImage.open(
        model, SamplerConfig(steps=1, **sampler), device=CPU, dtype=torch.float32
    )
    return opened.generate(["a cat"], [0])


@pytest.mark.parametrize("family", ["tiny_sd15", "tiny_sdxl"])
@pytest.mark.parametrize(
    "fields",
    [
        {"shift_factor": 0.5},
        {"latents_mean": [0.5, -0.5, 0.25, 1.0], "latents_std": [0.5, 2.0, 1.0, 1.5]},
    ],
)
def test_images_are_decoded_by_all_that_the_autoencoder_says(request, tmp_path, family, fields):
    """The pipeline of SD 1.5 reads none of these statistics, that of SDXL no shift."""
    folder = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "model"))
    file = folder / "vae" / "config.json"
    before = sampled(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    after = sampled(folder)

    model = locate_model(ModelSpec(path=str(folder)))
    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.float32)
    given = []
    vae = opened.model.autoencoder.network
    vae.decoder.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    opened.generate(["a cat"], [0])

    assert (after - before).abs().max() > 1e-3
    offset = torch.tensor(fields.get("latents_mean", [0.5] * 4)).view(1, 4, 1, 1)
    spread = torch.tensor(fields.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    plain = []
    vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    opened.model.autoencoder.scaling = LatentScaling(vae.config, device=CPU)
    vae.decoder.register_forward_pre_hook(lambda _, args: plain.append(args[0]))
    opened.generate(["a cat"], [0])
    unquantise = vae.post_quant_conv
    bias = unquantise.bias.view(1, -1, 1, 1)
    expected = unquantise(
        offset
        + spread
        * torch.linalg.solve(unquantise.weight[..., 0, 0], (plain[-1] - bias).flatten(2)).view_as(
            plain[-1]
        )
    )
    torch.testing.assert_close(given[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_tokenizer_without_a_length_takes_that_of_its_encoder(request, tmp_path, kind):
    folder = Path(shutil.copytree(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "model"))
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        config.pop("model_max_length")
        file.write_text(json.dumps(config))
    texts = ["a cat, a dog, a cow, a hen and a horse"]
    settings: Any = {"sdxl": SDXL, "sd15": SD15}[kind]

    models = [
        settings(path=str(path)).load(device=CPU, compute_dtype=torch.float32, reference="none")
        for path in (folder, request.getfixturevalue(f"tiny_{kind}"))
    ]
    ours, expected = (model.prompts.encode(texts).hidden_states for model in models)

    assert torch.equal(ours, expected)
    model = locate_model(ModelSpec(path=str(folder)))
    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.float32)
    assert model.truncated([*texts, "cat"]) == texts
    assert opened.generate(texts, [0]).isfinite().all()


def test_a_size_of_two_numbers_is_height_and_width(change):
    folder = change("unet/config.json", sample_size=[4, 6])
    SDXL(path=str(folder)).check()

    assert sampled(folder).shape == (1, 3, 32, 48)


@pytest.fixture
def single(tiny_sd15, tmp_path) -> Callable[..., Path]:
    """Writes the tiny SD 1.5 as one file with further keys and metadata."""

    def write(*keys: str, **metadata: str) -> Path:
        file = write_single_file(tiny_sd15, tmp_path / "model.safetensors")
        tensors = {**load_file(file), **{key: torch.empty(0) for key in keys}}
        save_file(tensors, file, metadata={k.replace("__", "."): v for k, v in metadata.items()})
        return file

    return write


@pytest.mark.parametrize(
    ("keys", "metadata", "prediction", "zero_snr"),
    [
        ((), {}, "epsilon", False),
        (("v_pred",), {}, "v_prediction", False),
        (("v_pred", "ztsnr"), {}, "v_prediction", True),
        ((), {"modelspec__prediction_type": "v"}, "v_prediction", False),
        ((), {"modelspec__prediction_type": "epsilon"}, "epsilon", False),
        ((), {"modelspec__predict_key": "v"}, "v_prediction", False),
        (
            (),
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            "v_prediction",
            True,
        ),
        ((), {"ss_zero_terminal_snr": "False"}, "epsilon", False),
    ],
)
def test_what_a_single_file_says_of_itself_is_followed(
    single, tiny_sd15, keys, metadata, prediction, zero_snr
):
    file = single(*keys, **metadata)
    settings = SD15(path=str(file), config=str(tiny_sd15))
    settings.check()

    noising = settings.noising()
    model = locate_model(ModelSpec(path=str(file), config=str(tiny_sd15)))
    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.float32)

    assert type(noising).__name__ == {"epsilon": "Epsilon", "v_prediction": "Velocity"}[prediction]
    assert (noising.alphas_cumprod[-1] == 0) == zero_snr
    assert opened.scheduler.config.prediction_type == prediction
    assert (opened.scheduler.alphas_cumprod[-1] < 1e-6) == zero_snr


def test_a_setting_decides_against_what_a_file_says(single, tiny_sd15):
    file = single("v_pred", "ztsnr", modelspec__prediction_type="epsilon")
    settings = SD15(path=str(file), config=str(tiny_sd15))

    with pytest.raises(ModelError, match="contradicts itself about what it predicts"):
        settings.noising()
    decided = SD15(
        path=str(file),
        config=str(tiny_sd15),
        prediction_type="epsilon",
        zero_terminal_snr=False,
    ).noising()
    assert type(decided).__name__ == "Epsilon"
    assert decided.alphas_cumprod[-1] > 0


@pytest.mark.parametrize(
    ("keys", "metadata", "message"),
    [
        (("edm_mean", "edm_std"), {}, "holds edm_mean, so it was trained with EDM"),
        (("edm_vpred.sigma_max",), {}, "holds edm_vpred.sigma_max"),
        ((), {"modelspec__prediction_type": "sample"}, "modelspec.prediction_type is 'sample'"),
    ],
)
def test_what_a_single_file_says_and_is_not_supported_is_refused(
    single, tiny_sd15, keys, metadata, message
):
    file = single(*keys, **metadata)

    with pytest.raises(ModelError, match=message):
        SD15(path=str(file), config=str(tiny_sd15)).check()
    with pytest.raises(ModelError, match=message):
        check_sampler(
            locate_model(ModelSpec(path=str(file), config=str(tiny_sd15))), SamplerConfig()
        )


def test_a_single_file_of_another_kind_than_its_config_is_refused(single, tiny_sd15):
    file = single()
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = load_file(file)
    wide = torch.zeros((len(tensors[name]), 9, 3, 3))
    save_file({**tensors, name: wide}, file)

    with pytest.raises(ModelError, match=r"takes 9 channels, and that of .* takes 4"):
        SD15(path=str(file), config=str(tiny_sd15)).check()


def test_an_exported_model_says_what_it_was_trained_with(single, tiny_sd15, tmp_path):
    file = single("v_pred", "ztsnr")
    settings = SD15(path=str(file), config=str(tiny_sd15))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="none")

    model.export(tmp_path / "final")

    noising = SD15(path=str(tmp_path / "final")).noising()
    assert type(noising).__name__ == "Velocity"
    assert noising.alphas_cumprod[-1] == 0


def test_an_autoencoder_that_overflows_is_named_when_images_are_made(tiny_sdxl):
    model = locate_model(ModelSpec(path=str(tiny_sdxl)))
    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.float32)
    opened.model.autoencoder.network.decoder.conv_out.weight.data.fill_(torch.inf)

    with pytest.raises(ModelError, match="the autoencoder, in float32, made values that are not"):
        opened.generate(["a cat"], [0])


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_must_not_be_halved_is_kept_in_float32(change, upcast):
    model = locate_model(ModelSpec(path=str(change("vae/config.json", force_upcast=upcast))))

    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.float16)

    assert opened.model.network.dtype == torch.float16
    assert opened.model.autoencoder.network.dtype == (torch.float32 if upcast else torch.float16)
