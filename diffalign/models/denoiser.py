"""A latent diffusion model in training, whatever its backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.base import AbstractTrainable
from diffalign.models.conditioning import AbstractConditioner, Framing, PromptEmbeddings
from diffalign.models.noising import AbstractNoising
from diffalign.models.placement import send
from diffalign.models.reference import AbstractReference
from diffalign.seeding import noise_from_seeds

Export = Callable[[Path, nn.Module, Mapping[str, Tensor]], None]
"""Writes trained values of a network, named as in it, into a folder."""


class DiffusionModel(AbstractTrainable):
    """A denoiser in training, with the frozen encoders around it.

    Only `network` trains. Autoencoder and text encoders are frozen, in evaluation mode, and never
    autocast. Dropout of the base network is off in the policy as in the reference, whatever mode
    the network is in; dropout of a LoRA adapter follows the mode.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        reference: AbstractReference,
        autoencoder: Any,
        conditioner: AbstractConditioner,
        noising: AbstractNoising,
        compute_dtype: torch.dtype,
        images_per_encoding: int,
        fingerprint: str,
        export: Export,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: the denoiser; what requires grad in it is what trains.
            reference: what stands in for it within `reference()`.
            autoencoder: a frozen `AutoencoderKL`.
            conditioner: around the frozen text encoders.
            noising: how the network was trained to be fed.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            images_per_encoding: how many the autoencoder takes at once.
            fingerprint: see `AbstractTrainable`.
            export: how trained values are written.
        """
        self.network = network
        self.noising = noising
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.device: torch.device = autoencoder.device
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._trained = [name for name, p in network.named_parameters() if p.requires_grad]
        self._reference = reference
        self._called: nn.Module | None = None
        self._compute_dtype = compute_dtype
        self._images_per_encoding = images_per_encoding
        self._fingerprint = fingerprint
        self._export = export

    @torch.no_grad()
    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample the autoencoder's posterior.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1], on any device.
            seeds: n of them; a row's sample depends on its image and its seed alone.

        Returns:
            Scaled latents, shape [n, channels, H / factor, W / factor], float32.
        """
        config = self.autoencoder.config
        with torch.autocast(self.device.type, enabled=False):
            chunks = [
                self.autoencoder.encode(part).latent_dist
                for part in send(images, self.device)
                .to(self.autoencoder.dtype)
                .split(self._images_per_encoding)
            ]
        mean = torch.cat([chunk.mean for chunk in chunks]).float()
        std = torch.cat([chunk.std for chunk in chunks]).float()
        noise = send(noise_from_seeds(seeds, tuple(mean.shape[1:])), self.device)
        shift = getattr(config, "shift_factor", None) or 0.0
        return (mean + std * noise - shift) * config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Encode n prompts, equal ones once; the empty prompt stands for a dropped caption."""
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        with torch.autocast(self.device.type, enabled=False):
            embeddings = self.conditioner.encode(distinct)
        return embeddings.rows(send(index, self.device))

    def condition(self, prompts: Sequence[str], framing: Framing) -> Mapping[str, Any]:
        """What `predict` needs to know about n images beside latent and time."""
        return self.conditioner.arguments(self.encode_prompts(prompts), framing)

    def predict(self, noisy: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Output of the policy, or within `reference()` of the reference.

        Args:
            noisy: from `noising.corrupt`, shape [n, channels, h, w], float32.
            time: from `noising.network_time`, shape [n].
            conditioning: from `condition`.

        Returns:
            A prediction of `noising.target`, same shape, in the dtype of the computation.
        """
        network = self.network if self._called is None else self._called
        reduced = self._compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced):
            prediction: Tensor = network(noisy, timestep=time, return_dict=False, **conditioning)[0]
        return prediction

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self._reference.instead_of(self.network) as network:
            self._called = network
            try:
                yield
            finally:
                self._called = None

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(self._unwrapped.named_parameters())
        return ((name, parameters[name]) for name in self._trained)

    def fingerprint(self) -> str:
        return self._fingerprint

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a LoRA file or a complete pipeline folder; the old content stays until then.

        Args:
            folder: replaced as a whole.
            state: values for all trained parameters by name; the current ones if None.

        Raises:
            ValueError: `state` lacks a trained parameter or names another.
        """
        values = dict(self.trained_parameters()) if state is None else dict(state)
        if values.keys() != set(self._trained):
            different = sorted(values.keys() ^ set(self._trained))
            raise ValueError(
                f"state must name every trained parameter and no other; differing: "
                f"{', '.join(different[:5])} ({len(different)} in all)"
            )
        self._export(folder, self._unwrapped, values)
