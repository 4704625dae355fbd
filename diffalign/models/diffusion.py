"""Latent diffusion models: what all backbones share.

A backbone is one file beside this one: a settings class derived from `AbstractDiffusion`, and the
conditioner that it makes.
"""

from __future__ import annotations

import abc
import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from diffalign import components
from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.base import AbstractModel, AbstractTrainable, ReferenceKind
from diffalign.models.conditioning import AbstractConditioner, Framing, PromptEmbeddings
from diffalign.models.export import with_weights, write_adapter, write_pipeline
from diffalign.models.locate import AbstractLocation, locate
from diffalign.models.lora import LoraSettings
from diffalign.models.noising import AbstractNoising, noising_from_scheduler
from diffalign.models.placement import send
from diffalign.models.reference import (
    AbstractReference,
    AdapterOff,
    FrozenCopy,
    NoReference,
)
from diffalign.seeding import noise_from_seeds

Attention = Literal["default", "sdpa", "xformers"]


class DiffusionModel(AbstractTrainable):
    """A denoiser in training, with the frozen encoders around it.

    Only `network` trains. Autoencoder and text encoders are frozen, in evaluation mode, and never
    autocast. Dropout of the base network is off in the policy as in the reference, whatever mode
    the network is in; dropout of a LoRA adapter follows the mode.
    """

    def __init__(
        self,
        *,
        settings: AbstractDiffusion,
        network: Any,
        reference: AbstractReference,
        autoencoder: Any,
        conditioner: AbstractConditioner,
        noising: AbstractNoising,
        compute_dtype: torch.dtype,
    ) -> None:
        self.network = network
        self.noising = noising
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.device: torch.device = autoencoder.device
        self._settings = settings
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._trained = [name for name, p in network.named_parameters() if p.requires_grad]
        self._reference = reference
        self._called: nn.Module | None = None
        self._compute_dtype = compute_dtype

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
                .split(self._settings.images_per_encoding)
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
        return self._settings.fingerprint()

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
        self._settings.export(folder, self._unwrapped, values)


@dataclass(frozen=True, kw_only=True)
class AbstractDiffusion(AbstractModel):
    """Settings that all latent diffusion backbones share."""

    pipeline: ClassVar[str]
    """Name of the diffusers pipeline class that the backbone's folders are made for."""
    unused: ClassVar[tuple[str, ...]]
    """Optional parts of that pipeline that training leaves unread."""
    text_encoders: ClassVar[tuple[str, ...]]
    """Names of the text encoders within the pipeline."""
    component: ClassVar[str] = "unet"
    """Name of the network within the pipeline."""

    path: str
    """A diffusers folder, a single `.safetensors` checkpoint, or a hub id such as `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    variant: str | None = None
    """Part of the weights' file names, such as `fp16`."""
    config: str | None = None
    """For a single checkpoint file: a folder or hub id of the same architecture, for what the file
    does not hold (configurations, tokenizers, schedule)."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """Replaces what the scheduler's configuration says; for single files that differ from it."""
    lora: LoraSettings | None = None
    """Train a low-rank adapter; null trains all weights of the network."""
    vae: str | None = None
    """Folder or hub id of another autoencoder, such as `madebyollin/sdxl-vae-fp16-fix`."""
    vae_dtype: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the autoencoder. SDXL's own overflows in fp16; the fp16-fix weights do not."""
    images_per_encoding: int = 4
    """Images that the autoencoder encodes at once, which bounds its memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    attention: Attention = "default"
    """`default` is diffusers' choice, `sdpa` torch's fused attention, `xformers` its extra."""
    compile: bool = False
    """Compile the network with torch.compile; the first steps take minutes."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. They can run any code when read."""

    def __post_init__(self) -> None:
        if self.images_per_encoding < 1:
            raise ValueError(
                f"images_per_encoding must be at least 1, got {self.images_per_encoding}"
            )

    @abc.abstractmethod
    def conditioner(self, components: Mapping[str, Any]) -> AbstractConditioner:
        """What tells the network of prompt and framing, from the loaded pipeline's components."""

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, so that the network without it is the reference."""
        return self.lora is not None

    @cached_property
    def _location(self) -> AbstractLocation:
        return locate(
            self.path,
            revision=self.revision,
            variant=self.variant,
            config=self.config,
            allow_pickle=self.allow_pickle,
        )

    def check(self) -> None:
        self._check_pipeline()
        self.noising()
        network = self._blank_network()
        for name in (self.component, "vae", *self.text_encoders):
            self._location.check_weights(name)
        if self.lora is not None:
            lora.check_targets(network, self.lora)
        if self.attention == "xformers" and importlib.util.find_spec("xformers") is None:
            raise ModelError(
                "attention is xformers, which is not installed: "
                "pip install 'diffalign[xformers]', or use sdpa"
            )

    def _check_pipeline(self) -> None:
        given = self._location.read_json("model_index.json").get("_class_name")
        if given == self.pipeline:
            return
        fitting = [
            kind
            for kind in components.kinds(AbstractModel)
            if getattr(components.find(AbstractModel, kind), "pipeline", None) == given
        ]
        advice = f"set kind to {fitting[0]}" if fitting else "no kind trains that"
        raise ModelError(
            f"{self.path} holds a {given}, but kind {components.kind_of(self)} trains a "
            f"{self.pipeline}: {advice}"
        )

    def _blank_network(self) -> Any:
        """The network without weights, for questions about its layers."""
        config = self._location.read_json(f"{self.component}/config.json")
        network_class = getattr(diffusers, str(config.get("_class_name")), None)
        if network_class is None:
            raise ModelError(
                f"{self.path}: {self.component}/config.json names the class "
                f"{config.get('_class_name')!r}, which diffusers {diffusers.__version__} lacks"
            )
        with torch.device("meta"):
            return network_class.from_config(config)

    def noising(self) -> AbstractNoising:
        """How the model was trained to be corrupted; reads its scheduler's configuration alone.

        Raises:
            ModelError: the configuration is missing or of a kind that is not supported.
        """
        config = self._location.read_json("scheduler/scheduler_config.json")
        return noising_from_scheduler(config, prediction_type=self.prediction_type)

    def load(
        self, *, device: torch.device, compute_dtype: torch.dtype, reference: ReferenceKind
    ) -> DiffusionModel:
        if reference == "adapter_off" and self.lora is None:
            raise ModelError(
                "reference adapter_off needs an adapter, and lora is null: use frozen_copy, or "
                "give lora a rank"
            )
        parts = self._read(**dict.fromkeys(self.unused)).components
        network = parts[self.component]
        _silence_dropout(network)
        self._set_attention(network)
        copied = copy.deepcopy(network) if reference == "frozen_copy" else None
        if copied is not None:
            _store_for_autocast(copied.requires_grad_(False).eval(), compute_dtype)
        if self.lora is not None:
            _store_for_autocast(network, compute_dtype)
            lora.attach(network, self.lora)
        else:
            network.requires_grad_(True)
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        for module in (network.train(), copied):
            if module is not None:
                module.to(device)
            if module is not None and self.compile:
                module.compile()
        for name in self.text_encoders:
            parts[name].requires_grad_(False).eval().to(device, compute_dtype)
        autoencoder = parts["vae"].requires_grad_(False).eval().to(device, _DTYPES[self.vae_dtype])
        return DiffusionModel(
            settings=self,
            network=network,
            reference=_reference(reference, copied),
            autoencoder=autoencoder,
            conditioner=self.conditioner(parts),
            noising=self.noising(),
            compute_dtype=compute_dtype,
        )

    def _read(self, **components: Any) -> Any:
        """The backbone's pipeline, in float32 on the CPU, around components that are given."""
        if self.vae is not None:
            components["vae"] = self._read_autoencoder(self.vae)
        pipeline = self._location.load(getattr(diffusers, self.pipeline), **components)
        if self.prediction_type is not None:
            pipeline.scheduler.register_to_config(prediction_type=self.prediction_type)
        return pipeline

    def _read_autoencoder(self, path: str) -> Any:
        try:
            return diffusers.AutoencoderKL.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"vae: cannot read an autoencoder from {path}: {error}") from error

    def _set_attention(self, network: Any) -> None:
        if self.attention == "sdpa":
            network.set_attn_processor(AttnProcessor2_0())
        elif self.attention == "xformers":
            network.enable_xformers_memory_efficient_attention()

    def fingerprint(self) -> str:
        """Tells base weights and shape of the training from others; reads little of the files."""
        weights = [
            self._location.identity(name) for name in (self.component, "vae", *self.text_encoders)
        ]
        shape = "full" if self.lora is None else repr(self.lora)
        return " ".join([self.pipeline, *weights, str(self.vae), str(self.prediction_type), shape])

    def export(self, folder: Path, network: Any, values: Mapping[str, Tensor]) -> None:
        """Write `values`, the trained parameters of `network`, for the backbone's pipeline."""
        if self.lora is not None:
            write_adapter(
                folder,
                pipeline=getattr(diffusers, self.pipeline),
                component=self.component,
                state=lora.portable_state(network, values, self.lora),
            )
        else:
            # Read anew: the encoders in memory were rounded to the precision of the run.
            write_pipeline(folder, self._read(**{self.component: with_weights(network, values)}))

    def describe(self) -> str:
        """One line for the start of a run."""
        shape = "all weights" if self.lora is None else f"LoRA of rank {self.lora.rank}"
        return f"{components.kind_of(self)} from {self.path}, training {shape}"


_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _reference(kind: ReferenceKind, copied: nn.Module | None) -> AbstractReference:
    if copied is not None:
        return FrozenCopy(copied)
    return AdapterOff() if kind == "adapter_off" else NoReference()


def _silence_dropout(network: nn.Module) -> None:
    """Turn dropout off for good, so that `train()` cannot bring it back."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _store_for_autocast(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of matrix products in `dtype`; the others stay in float32.

    Autocast rounds those same weights to `dtype` at every call, so the output is bit for bit that
    of a float32 network under autocast, for half the memory.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
