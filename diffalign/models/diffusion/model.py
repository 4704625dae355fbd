"""A latent diffusion model in training, whatever its backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import send
from diffalign.models.diffusion.autoencoder import Autoencoder
from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    Framing,
    PromptEmbeddings,
    stack_embeddings,
)
from diffalign.models.diffusion.noising import AbstractNoising
from diffalign.models.diffusion.prompt_cache import PromptCache
from diffalign.models.preparation import evaluation_mode
from diffalign.models.reference import AbstractReference, PastPolicy

_KEPT_PROMPTS = 256

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
        autoencoder: Autoencoder,
        conditioner: AbstractConditioner,
        noising: AbstractNoising,
        compute_dtype: torch.dtype,
        fingerprint: str,
        export: Export,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: the denoiser; what requires grad in it is what trains.
            reference: what is in for it within `reference()`.
            autoencoder: around the frozen network between images and latents.
            conditioner: around the frozen text encoders.
            noising: how the network was trained to be fed.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            fingerprint: see `AbstractTrainable`.
            export: how trained values are written.
        """
        self.network = network
        self.noising = noising
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.device = autoencoder.device
        self.evaluations = 0
        """Rows that entered the network so far, policy and reference alike; guidance is two."""
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._trained = [name for name, p in network.named_parameters() if p.requires_grad]
        self._reference = reference
        self._called: nn.Module | None = None
        self._prompts = PromptCache(conditioner, capacity=_KEPT_PROMPTS)
        self._compute_dtype = compute_dtype
        self._fingerprint = fingerprint
        self._export = export

    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Sample the autoencoder's posterior; no gradient.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1], on any device.
            seeds: n of them; a row's sample depends on its image and its seed alone.

        Returns:
            Scaled latents, shape [n, channels, H / factor, W / factor], float32.
        """
        return self.autoencoder.encode(images, seeds)

    def decode_images(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Sample the images behind scaled latents; no gradient.

        Args:
            latents: shape [n, channels, h, w], on any device.
            clamp: cut off what an image file could not hold. Judges of noisy images resize first.

        Returns:
            Shape [n, 3, h * factor, w * factor], float32, in [-1, 1] where clamped.
        """
        images = self.autoencoder.decode(latents)
        return images.clamp(-1.0, 1.0) if clamp else images

    @property
    def image_size(self) -> tuple[int, int]:
        """The network's own (height, width), in pixels."""
        config: Any = self._unwrapped.config
        size, factor = config.sample_size, self.autoencoder.factor
        height, width = (size, size) if isinstance(size, int) else size
        return height * factor, width * factor

    def latent_shape_at(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image of (height, width) pixels.

        Raises:
            ValueError: the autoencoder cannot divide that size.
        """
        (height, width), factor = size, self.autoencoder.factor
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width} pixels do not fit the autoencoder: height and width "
                f"must be multiples of {factor}"
            )
        config: Any = self._unwrapped.config
        return config.in_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Encode n prompts, equal ones once; the empty prompt represents a dropped caption."""
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        with torch.autocast(self.device.type, enabled=False):
            embeddings = self.conditioner.encode(distinct)
        return embeddings.rows(send(index, self.device))

    def condition(self, prompts: Sequence[str], framing: Framing) -> Mapping[str, Any]:
        """What `predict` needs to know about n images next to latent and time."""
        return self.conditioner.arguments(self.encode_prompts(prompts), framing)

    @torch.no_grad()
    def guidance_conditioning(
        self, prompts: Sequence[str], *, guidance: float, size: tuple[int, int] | None = None
    ) -> Mapping[str, Any]:
        """What `guided` needs to know about n images next to latent and time.

        Args:
            prompts: n of them. Each is encoded alone: a row does not depend on its company.
            guidance: the one that `guided` will be given; above 1 there are 2 n rows, the first n
                of them unconditional, as in the backbone's own pipeline.
            size: (height, width) of the images in pixels, told as that of the uncropped file; None
                is the network's own.
        """
        with torch.autocast(self.device.type, enabled=False):
            rows = [self._prompts.encode(prompt) for prompt in prompts]
            if guidance != 1:
                rows = [self._prompts.unconditional()] * len(prompts) + rows
        size = self.image_size if size is None else size
        framing = Framing(
            original_sizes=torch.tensor([size] * len(rows)),
            crop_corners=torch.zeros((len(rows), 2), dtype=torch.int64),
            target_size=size,
        )
        return self.conditioner.arguments(stack_embeddings(rows), framing)

    def guided(
        self, noisy: Tensor, time: Tensor, conditioning: Mapping[str, Any], *, guidance: float
    ) -> Tensor:
        """Prediction under classifier-free guidance, float32; one forward for both branches.

        Args:
            noisy: shape [n, channels, h, w], float32.
            time: from `noising.network_time`, shape [n].
            conditioning: from `guidance_conditioning`, with the same guidance.
            guidance: 1 is the conditional prediction itself.
        """
        if guidance == 1:
            return self.predict(noisy, time, conditioning).float()
        stacked = self.predict(torch.cat([noisy, noisy]), torch.cat([time, time]), conditioning)
        unconditional, conditional = stacked.float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def predict(self, noisy: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Output of the policy, or within `reference()` of the reference.

        Args:
            noisy: from `noising.corrupt`, shape [n, channels, h, w], float32.
            time: from `noising.network_time`, shape [n].
            conditioning: from `condition`.

        Returns:
            A prediction of `noising.target`, same shape, in the dtype of the computation.
        """
        network = self._current()
        self.evaluations += len(noisy)
        reduced = self._compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced):
            prediction: Tensor = network(noisy, timestep=time, return_dict=False, **conditioning)[0]
        return prediction

    def _current(self) -> nn.Module:
        return self.network if self._called is None else self._called

    @contextmanager
    def _calling(self, network: nn.Module) -> Iterator[None]:
        before, self._called = self._called, network
        try:
            yield
        finally:
            self._called = before

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self._reference.instead_of(self._current()) as network, self._calling(network):
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within this context the model only predicts: no gradient, no dropout of an adapter.

        The network is called bare, without its wrapper for several processes, so that ranks need
        not call equally often. Within `reference()` it is the reference that is sampled from.
        """
        network = self._current()
        network = self._unwrapped if network is self.network else network
        with torch.no_grad(), evaluation_mode(network), self._calling(network):
            yield

    def refer_to(self, values: Mapping[str, Tensor]) -> None:
        """Be the policy that had these trained parameters, within `reference()`, from now on.

        Args:
            values: one for every trained parameter, by name, such as an earlier `snapshot`.

        Raises:
            ValueError: names or shapes do not fit, or the model was loaded with another reference.
        """
        if not isinstance(self._reference, PastPolicy):
            raise ValueError(
                "this model's reference is fixed: load it with reference past_policy to choose it"
            )
        self._reference.refer_to(values)

    def snapshot(self) -> dict[str, Tensor]:
        """The trained parameters as they are now, copied to the CPU, by name."""
        return {name: p.detach().cpu().clone() for name, p in self.trained_parameters()}

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(self._unwrapped.named_parameters())
        return ((name, parameters[name]) for name in self._trained)

    def blame(self) -> str | None:
        return self.autoencoder.blame()

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
