"""From the parts of a pipeline where they lie to a model that trains, or that is sampled from.

What becomes of the denoiser once it is there (`TrainedNetwork`) reads no weights of it, so that a
network without any can be prepared in the same way.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.base import ReferenceKind
from diffalign.models.devices import freeze, materialize, remove_dropout, store_for_autocast
from diffalign.models.diffusion.autoencoder import Autoencoder, LatentScaling, PosteriorKind
from diffalign.models.diffusion.conditioning import AbstractConditioner, PromptEncoder
from diffalign.models.diffusion.model import DiffusionModel, Export
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.diffusion.pipeline_lora import add_adapter
from diffalign.models.diffusion.sampling import SampledModel
from diffalign.models.lora import LoraSettings, Scope
from diffalign.models.reference import reference_of

Attention = Literal["default", "sdpa", "xformers"]

Encoders = Literal["resident", "offload", "cached"]
"""Where autoencoder and text encoders are while a model trains."""

Conditioner = Callable[[Any], AbstractConditioner]
"""Makes what tells the network of prompt and framing out of a pipeline's parts."""


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """How a denoiser is made one in training."""

    lora: LoraSettings | None
    """The adapter; None trains all weights."""
    adapter_layers: Scope
    """Which layers may get one."""
    component: str
    """Name of the network within its pipeline."""
    attention: Attention
    fused_attention: type | None
    """The processor of torch's fused attention; None where the network's default is that."""
    gradient_checkpointing: bool
    compile: bool = False

    def check(self, network: Any) -> None:
        """Raise ModelError if the network cannot be trained so.

        Args:
            network: on the meta device; it may get an adapter.
        """
        if self.lora is not None:
            lora.check_targets(network, self.lora, scope=self.adapter_layers)
            lora.check_start(
                network, self.lora, component=self.component, scope=self.adapter_layers
            )
        if self.attention == "xformers":
            _check_xformers()

    def prepare(
        self, network: Any, compute_dtype: torch.dtype, *, copied: bool
    ) -> tuple[Any, Any | None]:
        """The policy, in training mode, and if asked for, its frozen copy.

        Args:
            network: in float32 on the CPU; it becomes the policy.
            compute_dtype: of the autocast; what is frozen is stored in it.
            copied: whether a copy is made.
        """
        remove_dropout(network.requires_grad_(False))
        materialize(network)
        self._set_attention(network)
        frozen = copy.deepcopy(network) if copied else None
        if frozen is not None:
            store_for_autocast(frozen, compute_dtype)
        if self.lora is None:
            network.requires_grad_(True)
        else:
            store_for_autocast(network, compute_dtype)
            network.float()  # DoRA reads lengths off the rounded weights
            lora.attach(network, self.lora, component=self.component, scope=self.adapter_layers)
            store_for_autocast(network, compute_dtype)
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network.train(), frozen

    def _set_attention(self, network: Any) -> None:
        if self.attention == "xformers":
            network.enable_xformers_memory_efficient_attention()
        elif self.attention == "sdpa" and self.fused_attention is not None:
            network.set_attn_processor(self.fused_attention())


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How the frozen parts around the network are kept and run."""

    vae_dtype: torch.dtype
    images_at_once: int
    """That the autoencoder encodes or decodes in one pass."""
    posterior: PosteriorKind = "full"
    """What is taken of what the autoencoder says of an image."""
    kept: Encoders = "resident"
    """Where they are; `cached` loads none of them."""


@dataclass(frozen=True, kw_only=True)
class FrozenEncoders:
    """What is around the network, without it."""

    autoencoder: Autoencoder
    prompts: PromptEncoder


def load_encoders(
    parts: PipelineParts,
    encoders: EncoderSettings,
    *,
    conditioner: Conditioner,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> FrozenEncoders:
    """Read autoencoder and text encoders, and no weight of the network.

    Args:
        parts: where they lie.
        encoders: how they are kept.
        conditioner: of the backbone.
        device: where they go.
        compute_dtype: of the text encoders.

    Raises:
        ModelError: files are damaged.
    """
    pipeline = parts.read(**{parts.component: parts.blank_network()})
    autoencoder = _freeze_encoders(pipeline, parts, encoders, device, compute_dtype)
    prompts = PromptEncoder(conditioner(pipeline), device=device)
    return FrozenEncoders(autoencoder=autoencoder, prompts=prompts)


def _freeze_encoders(
    pipeline: Any,
    parts: PipelineParts,
    encoders: EncoderSettings,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Autoencoder:
    """Place autoencoder and text encoders; the former is returned."""
    found = pipeline.components
    for name in parts.encoders:
        freeze(found[name], device, compute_dtype)
    freeze(found["vae"], device, encoders.vae_dtype)
    return Autoencoder(
        found["vae"], images_at_once=encoders.images_at_once, posterior=encoders.posterior
    )


def load_to_train(
    parts: PipelineParts,
    trained: TrainedNetwork,
    encoders: EncoderSettings,
    *,
    conditioner: Conditioner,
    export: Export,
    fingerprint: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    reference: ReferenceKind,
    trainable: bool,
) -> DiffusionModel:
    """Read the weights of a model that trains, or is evaluated as it trained.

    Args:
        parts: where they lie.
        trained: how the denoiser is made one in training.
        encoders: how the frozen parts are kept.
        conditioner: of the backbone.
        export: how trained values are written.
        fingerprint: of the base and the shape of the training.
        device: where everything goes.
        compute_dtype: in which the network computes.
        reference: what the policy is compared with.
        trainable: False keeps what would train like all that is frozen.

    Raises:
        ModelError: files are damaged, or the reference is not one of this model.
    """
    if reference == "adapter_off" and trained.lora is None:
        raise ModelError(
            "reference adapter_off needs an adapter, and lora is null: use frozen_copy, or "
            "give lora a rank"
        )
    if encoders.kept == "offload":
        raise ModelError("encoders: offload is not offered yet: use resident, or cached")
    scaling: Autoencoder | LatentScaling
    if encoders.kept == "cached":
        pipeline = parts.read(**dict.fromkeys(("vae", *parts.encoders)))
        scaling = LatentScaling(
            parts.whole_autoencoder_config(), device=device, posterior=encoders.posterior
        )
    else:
        pipeline = parts.read()
        scaling = _freeze_encoders(pipeline, parts, encoders, device, compute_dtype)
    policy, stand_in = trained.prepare(
        pipeline.components[parts.component], compute_dtype, copied=reference == "frozen_copy"
    )
    if not trainable:
        policy.requires_grad_(False)
        if trained.lora is None:  # an adapter is small, and DoRA reads lengths off it
            store_for_autocast(policy, compute_dtype)
    for network in (policy, stand_in):
        if network is not None:
            network.to(device)
        if network is not None and trained.compile:
            network.compile()
    return DiffusionModel(
        network=policy,
        reference=reference_of(reference, policy, stand_in),
        autoencoder=scaling,
        latent_space=parts.latent_space(),
        conditioner=conditioner(pipeline),
        noising=parts.noising(),
        compute_dtype=compute_dtype,
        fingerprint=fingerprint,
        export=export,
    )


def load_to_sample(
    parts: PipelineParts,
    *,
    conditioner: Conditioner,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path | None,
) -> SampledModel:
    """Read the weights of a model for sampling alone: see `AbstractDiffusion.load_to_sample`."""
    pipeline = parts.read()
    if adapter is not None:
        # Half precision would round away much of a small change, so there it stays separate.
        add_adapter(pipeline, adapter, merge=dtype == torch.float32)
    return SampledModel.of(
        pipeline,
        component=parts.component,
        text_encoders=parts.encoders,
        conditioner=conditioner(pipeline),
        latent_space=parts.latent_space(),
        device=device,
        dtype=dtype,
    )


def _check_xformers() -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ModelError(
            "attention is xformers, which is not installed: "
            "pip install 'diffalign[xformers]', or use sdpa"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            "attention is xformers, which needs a CUDA device, and this machine has none: use sdpa"
        )
