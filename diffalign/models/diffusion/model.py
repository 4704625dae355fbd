"""A latent diffusion model in training, whatever its backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.data.batches import ImageBatch
from diffalign.errors import ModelError
from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import evaluation_mode, send
from diffalign.models.diffusion.autoencoder import Autoencoder, LatentScaling, LatentSpace
from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    Framing,
    PromptEmbeddings,
    PromptEncoder,
)
from diffalign.models.diffusion.noising import AbstractNoising
from diffalign.models.diffusion.sampling import Denoise, with_guidance
from diffalign.models.reference import AbstractReference

Export = Callable[[Path, nn.Module, Mapping[str, Tensor]], None]
"""Writes trained values of a network, named as in it, into a folder."""

_NOT_LOADED = (
    "model.encoders is cached, so that neither autoencoder nor text encoders were loaded: set it "
    "to resident to encode or decode images while the model trains"
)


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
        autoencoder: Autoencoder | LatentScaling,
        latent_space: LatentSpace,
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
            autoencoder: around the frozen network between images and latents; or, where that is
                not there, the scaling of its latents: such a model takes batches with encodings
                alone.
            latent_space: of what shape latents are.
            conditioner: around the frozen text encoders, if they are there.
            noising: how the network was trained to be fed.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            fingerprint: see `AbstractTrainable`.
            export: how trained values are written.
        """
        self.network = network
        self.noising = noising
        self._autoencoder = autoencoder if isinstance(autoencoder, Autoencoder) else None
        self._scaling = autoencoder.scaling if isinstance(autoencoder, Autoencoder) else autoencoder
        self._conditioner = conditioner
        self._prompts = PromptEncoder(conditioner, device=autoencoder.device)
        self.latent_space = latent_space
        self.device = autoencoder.device
        self.evaluations = 0
        """Rows that entered the network so far, policy and reference alike; guidance is two."""
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._trained = [name for name, p in network.named_parameters() if p.requires_grad]
        self._reference = reference
        self._called: nn.Module | None = None
        self._within_reference = False
        self._compute_dtype = compute_dtype
        self._fingerprint = fingerprint
        self._export = export

    @property
    def autoencoder(self) -> Autoencoder:
        """Around the frozen network between images and latents.

        Raises:
            ModelError: it was not loaded.
        """
        if self._autoencoder is None:
            raise ModelError(_NOT_LOADED)
        return self._autoencoder

    @property
    def prompts(self) -> PromptEncoder:
        """Around the frozen text encoders.

        Raises:
            ModelError: they were not loaded.
        """
        if self._autoencoder is None:
            raise ModelError(_NOT_LOADED)
        return self._prompts

    @torch.no_grad()
    def latents(self, batch: ImageBatch) -> Tensor:
        """Scaled latents of V views of B samples, float32 [V * B, channels, h, w]; the rows of a
        view are consecutive."""
        seeds = [seed for view in batch.views for seed in batch.encoding_seeds[view]]
        if batch.encodings is None:
            return self.autoencoder.encode(torch.cat(list(batch.images.values())), seeds)
        posteriors = [batch.encodings.posteriors[view] for view in batch.views]
        return self._scaling.scaled(self._scaling.sample(torch.cat(posteriors), seeds))

    @torch.no_grad()
    def conditioning(self, batch: ImageBatch) -> Mapping[str, Any]:
        """What the network is told of the same rows next to latent and time."""
        framing = Framing(
            original_sizes=torch.cat([batch.original_sizes[view] for view in batch.views]),
            crop_corners=torch.cat([batch.crop_corners[view] for view in batch.views]),
            target_size=batch.size,
        )
        if batch.encodings is None:
            prompts = [prompt for view in batch.views for prompt in batch.prompts_of(view)]
            return self.prompts.framed(prompts, framing)
        known = {name: send(rows, self.device) for name, rows in batch.encodings.prompts.items()}
        rows = send(batch.encodings.prompt_rows.repeat(len(batch.views)), self.device)
        return self._conditioner.arguments(PromptEmbeddings(**known).rows(rows), framing)

    @torch.no_grad()
    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        guidance: float,
        size: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
    ) -> Denoise:
        """The policy, or where it is called within `reference()` the reference, with n prompts.

        Gradient flows into the network where it is enabled; the result is float32, and under
        guidance both branches are. Arguments are those of `Samplable`.
        """
        conditioning = self.prompts.guided(
            prompts,
            guidance=guidance,
            size=size or self.latent_space.image_size,
            negative_prompt=negative_prompt,
        )
        return with_guidance(
            lambda noisy, time: self.predict(noisy, time, conditioning).float(), guidance
        )

    @property
    def latent_dtype(self) -> torch.dtype:
        """Float32, whatever the network computes in."""
        return torch.float32

    def predict(self, noisy: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Output of the policy, or within `reference()` of the reference.

        Args:
            noisy: from `noising.corrupt`, shape [n, channels, h, w], float32.
            time: from `noising.network_time`, shape [n].
            conditioning: from `prompts`.

        Returns:
            A prediction of `noising.target`, same shape, in the dtype of the computation.
        """
        network = self._current()
        self.evaluations += len(noisy)
        reduced = self._compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced):
            prediction: Tensor = network(noisy, timestep=time, return_dict=False, **conditioning)[0]
        return prediction

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference that computes at the moment."""
        return self._within_reference

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
            before, self._within_reference = self._within_reference, True
            try:
                yield
            finally:
                self._within_reference = before

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
        self._reference.refer_to(values)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(self._unwrapped.named_parameters())
        return ((name, parameters[name]) for name in self._trained)

    def blame(self) -> str | None:
        return None if self._autoencoder is None else self._autoencoder.blame()

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
