"""Whether the parts of a latent diffusion model fit together, and ask for no more than they get.

Read from configurations alone, before weights are. What is asked for next to a latent, a time and
encoded prompts (an image to paint into, a class, the guidance scale, depth) cannot be given here,
and a network that does not get it would learn something else in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.errors import ModelError
from diffalign.models.diffusion.autoencoder import check_autoencoder

Config = Mapping[str, Any]

_BESIDE_THE_LATENT = {
    1: "a depth map, as depth-to-image models do",
    3: "a small image, as upscalers do",
    4: "an image to be edited, as InstructPix2Pix does",
    5: "a mask and an image to paint into, as inpainting models do",
}
"""What a denoiser is given in so many channels next to the latent."""

_ALLOWED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "class_embed_type": ((None,), "it wants to be told a class next to the prompt"),
    "num_class_embeds": ((None,), "it wants a class or a noise level, as upscalers do"),
    "encoder_hid_dim_type": ((None, "text_proj"), "it wants an image next to the prompt"),
    "attention_type": (("default",), "it wants boxes next to the prompt, as GLIGEN does"),
}
"""Fields of a denoiser: the values that can be given what they ask for, and what others ask for."""

_NETWORK = "UNet2DConditionModel"
_GUIDANCE_EMBEDDING = "time_cond_proj_dim"
_TIME_IDS = 6
"""Numbers that SDXL is told of the size and crop of an image."""


def check_unet(unet: Config, encoders: Mapping[str, Config], *, added: str | None) -> None:
    """Raise ModelError if a UNet asks for more than a latent, a time and prompts, or its text
    encoders write vectors of another width than it reads.

    Args:
        unet: the content of `unet/config.json`.
        encoders: that of each text encoder's, by its name, in the order of their vectors.
        added: its `addition_embed_type`: `text_time` for SDXL, None for SD 1.x and 2.x.
    """
    if unet.get("_class_name") != _NETWORK:
        raise ModelError(
            f"unet/config.json is of {unet.get('_class_name')!r}, which is called in another way "
            f"than a {_NETWORK}"
        )
    for name, (allowed, reason) in _ALLOWED.items():
        value = unet.get(name, allowed[0])
        if value not in allowed:
            raise ModelError(f"unet/config.json has {name} {value!r}: {reason}, which is not given")
    if unet.get("addition_embed_type") != added:
        raise ModelError(
            f"unet/config.json has addition_embed_type {unet.get('addition_embed_type')!r}, and a "
            f"network of this kind has {added!r}: it would not be told what it expects"
        )
    _check_text_encoders(unet, encoders)


def _check_text_encoders(unet: Config, encoders: Mapping[str, Config]) -> None:
    for name, config in encoders.items():
        if config.get("use_attention_mask"):
            raise ModelError(
                f"{name}/config.json has use_attention_mask {config['use_attention_mask']!r}: "
                f"prompts are encoded here without a mask, as Stable Diffusion does"
            )
    told = [config["hidden_size"] for config in encoders.values() if "hidden_size" in config]
    written = sum(told) if len(told) == len(encoders) else None
    projected = unet.get("encoder_hid_dim")
    field = "cross_attention_dim" if projected is None else "encoder_hid_dim"
    read = unet.get("cross_attention_dim", 1280) if projected is None else projected
    widths = set(read) if isinstance(read, Sequence) else {read}
    if written is not None and widths != {written}:
        raise ModelError(
            f"unet/config.json has {field} {read}, and the text encoders ({', '.join(encoders)}) "
            f"write vectors of width {written}: they were not made for each other"
        )
    if unet.get("addition_embed_type") != "text_time":
        return
    pooled = list(encoders.values())[-1].get("projection_dim")
    total = unet.get("projection_class_embeddings_input_dim")
    each = unet.get("addition_time_embed_dim")
    if pooled is None or total is None or each is None:
        return
    if total != pooled + _TIME_IDS * each:
        raise ModelError(
            f"unet/config.json has projection_class_embeddings_input_dim {total}, where a pooled "
            f"prompt of width {pooled} and {_TIME_IDS} numbers on the framing of {each} values "
            f"each make {pooled + _TIME_IDS * each}: a refiner, or another model that is told "
            f"something else of its images, is not trained here"
        )


def check_trainable(network: Config) -> None:
    """Raise ModelError if a denoiser would be trained on less than it is told when it samples, or
    does not say for which size it was made."""
    size = network.get("sample_size")
    pair = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)
    if not (pair or isinstance(size, int)):
        raise ModelError(
            f"unet/config.json has sample_size {size!r}: it must be the height and width of its "
            f"latents, one number or two (64 for images of 512 pixels)"
        )
    if network.get(_GUIDANCE_EMBEDDING) is not None:
        raise ModelError(
            f"unet/config.json has {_GUIDANCE_EMBEDDING} {network[_GUIDANCE_EMBEDDING]}: it was "
            f"distilled to be told the guidance scale (as the networks of latent consistency "
            f"models are), and training does not tell it. Train the model that it was distilled "
            f"from, and put the consistency LoRA on the result"
        )


def check_channels(
    network: Config,
    vae: Config,
    *,
    file: str = "unet/config.json",
    vae_file: str = "vae/config.json",
) -> None:
    """Raise ModelError unless autoencoder and denoiser work on latents of equal channels.

    Args:
        network: the content of the denoiser's `config.json`.
        vae: that of the autoencoder's.
        file: what to call the former.
        vae_file: what to call the latter.
    """
    check_autoencoder(vae, file=vae_file)
    latent = vae.get("latent_channels", 4)
    taken, given = network.get("in_channels", 4), network.get("out_channels", 4)
    if taken != latent:
        more = taken - latent if isinstance(taken, int) and isinstance(latent, int) else 0
        reason = (
            f"it is also given {_BESIDE_THE_LATENT[more]}, and there is none here"
            if more in _BESIDE_THE_LATENT
            else "they were not made for each other"
        )
        raise ModelError(
            f"{file} has in_channels {taken}, and {vae_file} has latent_channels {latent}: {reason}"
        )
    if given != latent:
        reason = (
            "it also predicts a variance, which is not trained here"
            if given == 2 * latent
            else "it predicts something else than the noise of a latent"
        )
        raise ModelError(
            f"{file} has out_channels {given}, and {vae_file} has latent_channels "
            f"{latent}: {reason}"
        )
