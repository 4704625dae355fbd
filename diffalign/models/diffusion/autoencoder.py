"""Between images and the scaled latents that a diffusion model works on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.devices import on_device, send
from diffalign.seeding import noise_from_seeds

_COLOURS = 3

PosteriorKind = Literal["full", "mean"]
"""What is taken of the Gaussian that an autoencoder makes of an image: all, and then it is sampled;
or its mean, which is the latent."""


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


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Of what shape the latents of an image are."""

    channels: int
    factor: int
    """Pixels per latent, along either side."""
    own_size: tuple[int, int] | None
    """(height, width) of the latents that the network was made for; None where it does not say."""
    patch: int = 1
    """Latents along either side that the network takes as one token."""

    @classmethod
    def of(cls, network: Mapping[str, Any], factor: int) -> LatentSpace:
        """Read it off a network's configuration."""
        size = network.get("sample_size")
        return cls(
            channels=network.get("in_channels", 4),
            factor=factor,
            own_size=(size, size) if isinstance(size, int) else size and (size[0], size[1]),
            patch=network.get("patch_size") or 1,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """The network's own (height, width), in pixels."""
        if self.own_size is None:
            raise ValueError(
                "the network's configuration has no sample_size, so the size of its images is not "
                "known: give height and width"
            )
        height, width = self.own_size
        return height * self.factor, width * self.factor

    def shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image.

        Args:
            size: (height, width) of the image in pixels; None is the network's own.

        Raises:
            ValueError: autoencoder and network cannot divide that size, or do not say their own.
        """
        (height, width), step = size or self.image_size, self.factor * self.patch
        if height % step or width % step:
            raise ValueError(
                f"images of {height}x{width} pixels do not fit the autoencoder: height and width "
                f"must be multiples of {step}"
            )
        return self.channels, height // self.factor, width // self.factor


class LatentScaling:
    """Between posteriors and scaled latents: needs the autoencoder's configuration alone.

    A posterior is a tensor [n, 2 * channels, h, w] of means and then standard deviations, or, where
    the mean is all that counts, [n, channels, h, w]. Latents are scaled by what the configuration
    says of them: `scaling_factor`, and `shift_factor` or a mean and a standard deviation for each
    channel (`latents_mean`, `latents_std`).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        posterior: PosteriorKind = "full",
    ) -> None:
        """Take what the configuration says.

        Args:
            config: the content of its `config.json`.
            device: where latents go.
            posterior: what is taken of one.
        """
        self.device = device
        self.posterior = posterior
        mean, std = config.get("latents_mean"), config.get("latents_std")
        scale: float = config.get("scaling_factor", 1.0)
        self._offset: Tensor | float = config.get("shift_factor") or 0.0
        self._factor: Tensor | float = scale
        if mean is not None and std is not None:
            offset, spread = (
                torch.tensor(value).float().view(1, -1, 1, 1) for value in (mean, std)
            )
            self._offset, self._factor = send(offset, device), send(scale / spread, device)

    def sample(self, posterior: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample n posteriors, before any scaling; float32 [n, channels, h, w].

        Args:
            posterior: on any device, in any float type.
            seeds: n of them; where the mean is taken, nothing depends on them.
        """
        moments = send(posterior, self.device).float()
        if self.posterior == "mean":
            return moments
        mean, std = moments.chunk(2, dim=1)
        return mean + std * send(noise_from_seeds(seeds, tuple(mean.shape[1:])), self.device)

    def scaled(self, sample: Tensor) -> Tensor:
        """What a network works on, of samples as the autoencoder makes them."""
        return (sample - self._offset) * self._factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The way back, float32."""
        return send(latents, self.device).float() / self._factor + self._offset


class Autoencoder:
    """A frozen `AutoencoderKL`, never autocast, given few images at once."""

    def __init__(
        self,
        network: Any,
        *,
        images_at_once: int,
        posterior: PosteriorKind = "full",
        device: torch.device | None = None,
    ) -> None:
        """Take a loaded network.

        Args:
            network: an `AutoencoderKL` in its dtype.
            images_at_once: how many it encodes or decodes in one pass, which bounds its memory.
            posterior: what is taken of one.
            device: where it computes, if it lies elsewhere; None is where it lies.
        """
        self.network = network
        self.device: torch.device = network.device if device is None else device
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)
        """Pixels per latent, along either side."""
        self.scaling = LatentScaling(network.config, device=self.device, posterior=posterior)
        self.images_at_once = images_at_once
        self._broke = torch.zeros((), dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """The Gaussians that images are encoded as, see `LatentScaling`; no gradient.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1], on any device.

        Returns:
            In the autoencoder's dtype, so that nothing of it is rounded.
        """
        with self._computing():
            chunks = [
                self.network.encode(part).latent_dist
                for part in send(images, self.device)
                .to(self.network.dtype)
                .split(self.images_at_once)
            ]
        full = self.scaling.posterior == "full"
        found = torch.cat([torch.cat([c.mean, c.std], dim=1) if full else c.mean for c in chunks])
        self._note(images, found)
        return found

    @torch.no_grad()
    def encode(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample the posterior; no gradient.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1], on any device.
            seeds: n of them; a row's sample depends on its image and its seed alone.

        Returns:
            Scaled latents, shape [n, channels, H / factor, W / factor], float32.
        """
        return self.scaling.scaled(self.scaling.sample(self.posterior(images), seeds))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Turn scaled latents into images; no gradient.

        Args:
            latents: shape [n, channels, h, w], on any device.
            clamp: cut off what an image file could not hold. Scorers of noisy images resize first.

        Returns:
            Shape [n, 3, h * factor, w * factor], float32, in [-1, 1] where clamped.
        """
        unscaled = self.scaling.unscaled(latents)
        with self._computing():
            chunks = [
                self.network.decode(part).sample
                for part in unscaled.to(self.network.dtype).split(self.images_at_once)
            ]
        images = torch.cat(chunks).float()
        self._note(unscaled, images)
        return images.clamp(-1.0, 1.0) if clamp else images

    @contextmanager
    def _computing(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, enabled=False)
        with on_device([self.network], self.device), autocast:
            yield

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
