"""From the parts of a pipeline where they lie to a model that trains, or that is sampled from.

What becomes of the denoiser once it is there (`TrainedNetwork`) reads no weights of it, so that a
network without any can be prepared in the same way.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.base import ReferenceKind
from diffalign.models.devices import (
    freeze,
    keep_in_host_memory,
    remove_dropout,
    store_for_autocast,
    stored_copy,
)
from diffalign.models.diffusion.autoencoder import Autoencoder, LatentScaling, PosteriorKind
from diffalign.models.diffusion.blocks import check_blocks, checkpoint_blocks, compile_blocks
from diffalign.models.diffusion.conditioning import AbstractConditioner, PromptEncoder
from diffalign.models.diffusion.model import DiffusionModel, Export
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.diffusion.pipeline_lora import add_adapter
from diffalign.models.diffusion.sampling import SampledModel
from diffalign.models.lora import LoraSettings, Scope
from diffalign.models.quantization import Bits, check_quantization, quantise_blank
from diffalign.models.reference import reference_of
from diffalign.models.sharding import Sharder
from diffalign.models.weights import Places, cast_blank, fill, places_in

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
    gradient_checkpointing: bool | tuple[str, ...]
    """Whether activations are recomputed, or the names of the blocks in which they are."""
    compile: bool | Literal["blocks"] = False
    channels_last: bool = False
    quantization: Bits | None = None
    """Bits of the frozen weights of transformer blocks."""

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
        if not isinstance(self.gradient_checkpointing, bool):
            check_blocks(network, self.gradient_checkpointing)
        if self.quantization is not None:
            check_quantization(self.quantization)

    def check_sharding(self) -> None:
        """Raise ValueError unless the network can be shared out among processes."""
        whole = {
            "quantization": self.quantization is not None,
            "lora.dora": self.lora is not None and self.lora.dora,
            "compile": self.compile is True,
            "channels_last": self.channels_last,
        }
        for name, asked in whole.items():
            if asked:
                raise ValueError(f"model.{name} works with whole weights alone: leave it out")

    def store(self, network: Any, compute_dtype: torch.dtype, *, trainable: bool = True) -> Any:
        """Give every weight the dtype in which it is kept.

        Args:
            network: whole and without an adapter, blank or with values; changed in place.
            compute_dtype: of the autocast; what is frozen and multiplied is stored in it.
            trainable: whether all weights train, where there is no adapter.
        """
        remove_dropout(network.requires_grad_(False))
        if self.lora is not None or not trainable:
            store_for_autocast(network, compute_dtype)
        if self.quantization is not None:
            quantise_blank(network, self.quantization, compute_dtype)
        return network

    def prepare(
        self, network: Any, compute_dtype: torch.dtype, *, copied: bool = False
    ) -> tuple[Any, Any | None]:
        """The policy, in training mode, and if asked for, its frozen copy.

        Args:
            network: from `store`; it becomes the policy. It may lie on any device, and a new
                adapter is made on the CPU.
            compute_dtype: of the autocast; what is frozen is stored in it.
            copied: whether a copy is made, of which no more is held than stays.
        """
        self._set_attention(network)
        frozen = stored_copy(network, compute_dtype) if copied else None
        if self.lora is None:
            network.requires_grad_(True)
        else:
            with _layers_in_float32(network, self.lora, self.adapter_layers):
                lora.attach(network, self.lora, component=self.component, scope=self.adapter_layers)
            store_for_autocast(network, compute_dtype)
        if self.gradient_checkpointing is True:
            network.enable_gradient_checkpointing()
        elif self.gradient_checkpointing:
            checkpoint_blocks(network, self.gradient_checkpointing)
        return network.train(), frozen

    def _set_attention(self, network: Any) -> None:
        if self.attention == "xformers":
            network.enable_xformers_memory_efficient_attention()
        elif self.attention == "sdpa" and self.fused_attention is not None:
            network.set_attn_processor(self.fused_attention())


@contextmanager
def _layers_in_float32(network: Any, settings: LoraSettings, scope: Scope) -> Iterator[None]:
    """Within this context, layers that get an adapter show it weights in float32.

    An adapter is made in the precision of its layer, which would round its first values. DoRA reads
    lengths off the weights; to any other adapter a weight is a shape, and takes no memory.
    """
    pattern = re.compile(scope.pattern(settings.targets))
    kept = []
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not pattern.fullmatch(name):
            continue
        if type(weight) is not nn.Parameter:
            continue  # a quantised one, or a fake
        if weight.dtype == torch.float32 and not weight.is_meta:
            continue
        shown = weight.detach().to("cpu", torch.float32) if settings.dora else torch.zeros(())
        kept.append((layer, weight))
        layer.weight = nn.Parameter(shown.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in kept:
            layer.weight = weight


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
    tiling: bool = False
    """Let the autoencoder take large images in overlapping tiles."""


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
    pipeline, autoencoder = _read(
        parts, encoders, device=device, compute_dtype=compute_dtype, denoiser=False
    )
    assert autoencoder is not None
    prompts = PromptEncoder(conditioner(pipeline), device=device)
    return FrozenEncoders(autoencoder=autoencoder, prompts=prompts)


def _fill_shards(parts: PipelineParts, sharder: Sharder, network: Any, places: Places) -> None:
    """Share a blank network out, and read this process's part of its weights."""
    sharder.shard(network)
    stored = parts.location.stored(parts.component, network.config)
    if stored is None:
        raise ModelError(
            f"{parts.name}: training.sharding reads weights tensor by tensor, and those of "
            f"{parts.component} cannot be: write it as a folder of safetensors first, with "
            f"pipeline.save_pretrained(FOLDER)"
        )
    fill(network, stored, device=sharder.home, places=places)


def _read(
    parts: PipelineParts,
    encoders: EncoderSettings,
    *,
    network: Any | None = None,
    device: torch.device,
    compute_dtype: torch.dtype,
    denoiser: bool = True,
    filled: bool = True,
) -> tuple[Any, Autoencoder | None]:
    """The pipeline with its autoencoder and text encoders where they are kept; the former, if there
    is one, is returned as well. The denoiser may be left blank."""
    home = torch.device("cpu") if encoders.kept == "offload" else device
    pipeline = parts.read(
        network,
        text_dtype=compute_dtype,
        vae_dtype=encoders.vae_dtype,
        device=device,
        vae_device=home,
        encoders=encoders.kept != "cached" or not denoiser,
        denoiser=denoiser and filled,
    )
    found = pipeline.components
    if found["vae"] is None:
        return pipeline, None
    for name in parts.encoders:
        freeze(found[name], home, compute_dtype)
    freeze(found["vae"], home, encoders.vae_dtype)
    if encoders.kept == "offload":
        keep_in_host_memory([found[name] for name in (*parts.encoders, "vae")], device)
    if encoders.tiling:
        found["vae"].enable_tiling()
    autoencoder = Autoencoder(
        found["vae"],
        images_at_once=encoders.images_at_once,
        posterior=encoders.posterior,
        device=device,
    )
    return pipeline, autoencoder


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
    sharder: Sharder | None = None,
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
        sharder: shares the weights of the denoiser, and of its frozen copy, out among processes;
            None keeps them whole.

    Raises:
        ModelError: files are damaged, or the reference is not one of this model.
    """
    if reference == "adapter_off" and trained.lora is None:
        raise ModelError(
            "reference adapter_off needs an adapter, and lora is null: use frozen_copy, or "
            "give lora a rank"
        )
    pipeline, autoencoder = _read(
        parts,
        encoders,
        network=trained.store(parts.blank_network(), compute_dtype, trainable=trainable),
        device=device,
        compute_dtype=compute_dtype,
        filled=sharder is None,
    )
    scaling: Autoencoder | LatentScaling = autoencoder or LatentScaling(
        parts.whole_autoencoder_config(), device=device, posterior=encoders.posterior
    )
    network = pipeline.components[parts.component]
    places = places_in(network)
    policy, stand_in = trained.prepare(network, compute_dtype, copied=reference == "frozen_copy")
    if not trainable:
        policy.requires_grad_(False)
    if sharder is not None:
        _fill_shards(parts, sharder, policy, places)
        if stand_in is not None:
            _fill_shards(parts, sharder, stand_in, places_in(stand_in))
    for network in (policy, stand_in):
        if network is not None and sharder is None:
            network.to(device)
        if network is not None and trained.channels_last:
            network.to(memory_format=torch.channels_last)
        if network is not None and trained.compile == "blocks":
            compile_blocks(network)
        elif network is not None and trained.compile:
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
    upcast = dtype == torch.float16 and parts.autoencoder_config.get("force_upcast", True)
    vae_dtype = torch.float32 if upcast else dtype
    pipeline = parts.read(
        cast_blank(parts.blank_network(), dtype),
        text_dtype=dtype,
        vae_dtype=vae_dtype,
        device=device,
    )
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
