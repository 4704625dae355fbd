"""Between images and the scaled latents that a diffusion model works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.devices import send
from diffalign.seeding import noise_from_seeds

_COLOURS = 3


def check_autoencoder(config: Mapping[str, Any], *, file: str) -> None:
    """Raise ModelError unless an autoencoder's configuration is one that `Autoencoder` follows.

    Args:
        config: the content of its `config.json`, without the defaults that its class adds.
        file: what to call it in the error.
    """
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise ModelError(f"{file} is of {kind!r}: images are encoded by an AutoencoderKL alone")
    for name in ("in_channels", "out_channels"):
        if config.get(name, _COLOURS) != _COLOURS:
            raise ModelError(f"{file} has {name} {config[name]!r}: images have {_COLOURS} channels")
    scale = config.get("scaling_factor", 1.0)
    if not _is_number(scale) or scale <= 0:
        raise ModelError(f"{file} has scaling_factor {scale!r}: it must be a number above 0")
    shift = config.get("shift_factor")
    if shift is not None and not _is_number(shift):
        raise ModelError(f"{file} has shift_factor {shift!r}: it must be a number, or null")
    channels = config.get("latent_channels", 4)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ModelError(
            f"{file} has one of latents_mean and latents_std: give both, or set both to null"
        )
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        listed = isinstance(values, list) and all(map(_is_number, values))
        if not listed or len(values) != channels:
            raise ModelError(
                f"{file} has {name} {values!r}: it must be a list of one number for each of the "
                f"{channels} latent_channels"
            )
    if std is not None and min(std) <= 0:
        raise ModelError(f"{file} has latents_std {std!r}: standard deviations are above 0")
    if mean is not None and shift:
        raise ModelError(
            f"{file} has both shift_factor and latents_mean, and does not say which is taken off "
            f"first: set the one that is not meant to null"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Autoencoder:
    """A frozen `AutoencoderKL`, never autocast, given few images at once.

    Latents are scaled by what its configuration says of them: `scaling_factor`, and `shift_factor`
    or a mean and a standard deviation for each channel (`latents_mean`, `latents_std`).
    """

    def __init__(self, network: Any, *, images_at_once: int) -> None:
        """Take a loaded network.

        Args:
            network: an `AutoencoderKL`, on its device and in its dtype.
            images_at_once: how many it encodes or decodes in one pass, which bounds its memory.
        """
        self.network = network
        self.device: torch.device = network.device
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)
        """Pixels per latent, along either side."""
        self._images_at_once = images_at_once
        self._broke = torch.zeros((), dtype=torch.bool, device=self.device)

    def _statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """What is taken off latents, and what the rest is multiplied by: numbers, or float32
        [1, channels, 1, 1]."""
        config = self.network.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        scale: float = config.scaling_factor
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, scale
        offset, spread = (torch.tensor(values).float().view(1, -1, 1, 1) for values in (mean, std))
        return send(offset, self.device), send(scale / spread, self.device)

    @torch.no_grad()
    def encode(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample the posterior: see `DiffusionModel.encode_images`."""
        with torch.autocast(self.device.type, enabled=False):
            chunks = [
                self.network.encode(part).latent_dist
                for part in send(images, self.device)
                .to(self.network.dtype)
                .split(self._images_at_once)
            ]
        mean = torch.cat([chunk.mean for chunk in chunks]).float()
        std = torch.cat([chunk.std for chunk in chunks]).float()
        noise = send(noise_from_seeds(seeds, tuple(mean.shape[1:])), self.device)
        offset, factor = self._statistics()
        sample = mean + std * noise
        self._note(images, sample)
        return (sample - offset) * factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into images: see `DiffusionModel.decode_images`."""
        offset, factor = self._statistics()
        unscaled = send(latents, self.device).float() / factor + offset
        with torch.autocast(self.device.type, enabled=False):
            chunks = [
                self.network.decode(part).sample
                for part in unscaled.to(self.network.dtype).split(self._images_at_once)
            ]
        images = torch.cat(chunks).float()
        self._note(unscaled, images)
        return images

    def _note(self, given: Tensor, made: Tensor) -> None:
        """Remember, without waiting for the device, whether a row broke in here."""
        whole = send(given, self.device).flatten(start_dim=1).isfinite().all(dim=1)
        broken = ~made.flatten(start_dim=1).isfinite().all(dim=1)
        self._broke = self._broke | (whole & broken).any()

    def blame(self) -> str | None:
        """Why values were not finite, where the autoencoder made them from finite ones; waits for
        the device."""
        if not self._broke:
            return None
        name = str(self.network.dtype).removeprefix("torch.")
        if self.network.dtype == torch.float16:
            return (
                f"the autoencoder, in {name}, made values that are not finite of finite ones: "
                f"that of SDXL overflows there. Set model.vae_dtype to float32, or model.vae to "
                f"weights that do not, such as madebyollin/sdxl-vae-fp16-fix"
            )
        return (
            f"the autoencoder, in {name}, made values that are not finite of finite ones: its "
            f"weights are damaged, or of another model; set model.vae to others"
        )
