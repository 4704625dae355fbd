"""Settings of latent diffusion models, and how they become a model.

A backbone is one file next to this one: settings of `AbstractDiffusion`, and their conditioner.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from diffalign import components
from diffalign.config import MAY_CHANGE
from diffalign.models import lora
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.models.base import AbstractBlank, AbstractModel, ReferenceKind
from diffalign.models.devices import DTYPES, Precision
from diffalign.models.diffusion.agreement import check_trainable
from diffalign.models.diffusion.autoencoder import PosteriorKind
from diffalign.models.diffusion.conditioning import AbstractConditioner
from diffalign.models.diffusion.export import (
    export_adapter,
    next_step,
    usage,
    with_weights,
    write_pipeline,
)
from diffalign.models.diffusion.kohya import KohyaLora, LoraLayer, kohya_lora
from diffalign.models.diffusion.loading import (
    Attention,
    Encoders,
    EncoderSettings,
    TrainedNetwork,
    load_to_sample,
    load_to_train,
)
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractNoising
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.diffusion.sampling import SampledModel
from diffalign.models.diffusion.schedulers import build_scheduler
from diffalign.models.locate import locate, with_network
from diffalign.models.lora import LoraSettings, Scope, start_digest
from diffalign.models.quantization import Bits, refuse_around
from diffalign.models.runs import in_words
from diffalign.models.sharding import Sharder
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class AbstractDiffusion(AbstractModel):
    """Settings that all latent diffusion backbones share."""

    pipeline: ClassVar[str]
    """Name of the diffusers pipeline class that the backbone's folders are made for."""
    left_out: ClassVar[Mapping[str, Any]]
    """Arguments that open that pipeline without the parts that training has no use for."""
    text_encoders: ClassVar[tuple[str, ...]]
    """Names of the text encoders within the pipeline; a folder may lack some."""
    component: ClassVar[str] = "unet"
    """Name of the network within the pipeline."""
    same_parts: ClassVar[tuple[str, ...]] = ()
    """Names of other pipeline classes whose folders hold the very same parts."""
    adapter_layers: ClassVar[Scope] = lora.DENOISER
    """Layers of the network that get an adapter where the settings name none."""
    fused_attention: ClassVar[type | None] = AttnProcessor2_0
    """What `attention: sdpa` puts into the network; None where its default is that already."""
    original_layout: ClassVar[bool] = True
    """Whether kohya's tools have names for its layers."""

    path: str = field(metadata=MAY_CHANGE)
    """A diffusers folder, a single `.safetensors` checkpoint, a hub id such as `owner/name`, or the
    folder of a run that trained all weights (or of one that has not finished, or of one of its
    checkpoints)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    variant: str | None = None
    """Part of the weights' file names, such as `fp16`."""
    config: str | None = None
    """For a single checkpoint file: a folder or hub id of the same architecture, for what the file
    does not hold (configurations, tokenizers, schedule)."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the network predicts; null takes what the single file says of itself (keys such as
    `v_pred`, metadata), then what the scheduler's configuration says."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep holds no image at all (arXiv:2305.08891); null takes what the
    single file says of itself (key `ztsnr`), then the scheduler's `rescale_betas_zero_snr`."""
    unet: str | None = None
    """Another denoiser in the place of that of `path`: a folder or hub id that holds one, alone or
    in a folder `unet`, such as `mhdang/dpo-sdxl-text2image-v1`, or a `.safetensors` file of one."""
    unet_revision: str | None = None
    """Branch, tag or commit of that denoiser's hub id; null is its default branch."""
    lora: LoraSettings | None = None
    """Train a low-rank adapter; null trains all weights of the network."""
    vae: str | None = None
    """Folder or hub id of another autoencoder, such as `madebyollin/sdxl-vae-fp16-fix`."""
    vae_revision: str | None = None
    """Branch, tag or commit of that autoencoder's hub id; null is its default branch."""
    vae_dtype: Precision = "float32"
    """Of the autoencoder. SDXL's own overflows in fp16; the fp16-fix weights do not."""
    images_per_encoding: Annotated[int, AtLeast(1)] = 4
    """Images that the autoencoder encodes or decodes at once, which bounds its memory."""
    posterior: PosteriorKind = "full"
    """The latent of an image: a new sample of what the autoencoder says of it at each visit
    (`full`), or always the mean of that (`mean`), which takes half the room in a cache."""
    vae_tiling: bool = False
    """Let the autoencoder take images above its own size in overlapping tiles: less memory, and
    latents that differ a little where tiles meet."""
    encoders: Encoders = field(default="resident", metadata=MAY_CHANGE)
    """Where autoencoder and text encoders are while the model trains: `resident` on the device;
    `offload` in host memory, from which they are copied to the device for each use and dropped
    there; or `cached`, which reads what `diffalign precompute` made of the data with them, and
    loads neither: nothing can be sampled from the model then."""
    quantization: Bits | None = None
    """Keep the frozen weights of transformer blocks in 4 bits (NF4, quantised twice) or in 8, which
    needs the bitsandbytes extra and `lora`; convolutions and all else stay as they are. The
    reference is that same network without the adapter."""
    gradient_checkpointing: bool | tuple[str, ...] = False
    """Recompute activations in the backward pass: less memory, a third more time. A list of blocks
    does so in these alone, such as `[down_blocks.2, mid_block, up_blocks.0]`."""
    attention: Attention = "default"
    """`default` is diffusers' choice, `sdpa` torch's fused attention, `xformers` its extra."""
    compile: bool | Literal["blocks"] = False
    """Compile the network with torch.compile; the first steps take minutes. `blocks` compiles its
    transformer blocks alone, each for itself, which takes a fraction of that."""
    channels_last: bool = False
    """Lay out convolutions with the channels innermost, as tensor cores read them; results then
    differ in the last bits."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors: tensors alone, by torch's restricted
    unpickler (`weights_only=True`), which refuses a file with anything else in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization is not None:
            refuse_around(self.quantization, lora=self.lora, compiled=bool(self.compile))
        for part, what in (("vae", "autoencoder"), ("unet", "denoiser")):
            revision = getattr(self, f"{part}_revision")
            if revision is not None and getattr(self, part) is None:
                raise ValueError(
                    f"{part}_revision is {revision!r}, but {part} is null: name the {what}"
                )

    @abc.abstractmethod
    def conditioner(self, pipeline: Any) -> AbstractConditioner:
        """What tells the network of prompt and framing, made of the loaded pipeline's parts."""

    @abc.abstractmethod
    def check_configs(
        self, network: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Raise ModelError unless the network is told what it expects, and by these encoders.

        Args:
            network: the content of its `config.json`, with its class's defaults.
            encoders: that of each text encoder that is there, by name.
        """

    @property
    def makes(self) -> Literal["images"]:
        return "images"

    def blank(self) -> AbstractBlank:
        from diffalign.models.diffusion.blank import BlankDiffusion  # which is made of this

        return BlankDiffusion(self)

    @property
    def trains_adapter(self) -> bool:
        return self.lora is not None

    @property
    def continues_adapter(self) -> bool:
        return self.lora is not None and self.lora.start is not None

    @property
    def library(self) -> str:
        return "diffusers"

    @property
    def task(self) -> str:
        return "text-to-image"

    @property
    def export_note(self) -> str:
        note = "`kohya_lora.safetensors`, where it is there, is the same for ComfyUI and A1111."
        return note if self.lora and self.original_layout else ""

    def usage(self, folder: str) -> str:
        return usage(
            self.pipeline,
            self.path,
            folder,
            adapter=ADAPTER_FILE if self.lora is not None else None,
            denoiser=self.unet,
            component=self.component,
            absent=self.absent_parts(),
        )

    def absent_parts(self) -> tuple[str, ...]:
        """Parts that its pipeline may lack, and this model lacks."""
        return ()

    def next_step(self, run: Path) -> str:
        names = ("path", "revision", "variant", "config", "prediction_type")
        return next_step({n: getattr(self, n) for n in names}, self.lora and self.lora.start, run)

    def policy_fingerprint(self) -> str:
        """Identifies the policy that training begins with: network, adapter, text encoders. A new
        adapter is the base, a continued one the policy of the run that it comes from."""
        identity, names = self.parts.location.identity, (self.component, *self.parts.encoders)
        parts = [self.pipeline, *map(identity, names), start_digest(self.lora)]
        parts += [] if self.quantization is None else [self.quantization]  # other values without it
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def reference_settings(self) -> Mapping[str, Any]:
        return {
            "model.kind": components.kind_of(self),
            "model.lora.start": start_digest(self.lora),
            **self.parts.reference_identities(),
            **{f"model.{n}": getattr(self, n) for n in ("vae_dtype", "vae_tiling", "posterior")},
            "model.quantization": self.quantization,
        }

    def tokenizers(self) -> list[Any]:
        return self.parts.tokenizers()

    @cached_property
    def parts(self) -> PipelineParts:
        """Of the pipeline, where they lie."""
        location = locate(
            self.path,
            revision=self.revision,
            variant=self.variant,
            config=self.config,
            allow_pickle=self.allow_pickle,
        )
        if self.unet is not None:
            location = with_network(
                location, self.unet, component=self.component, revision=self.unet_revision
            )
        return PipelineParts(
            name=self.path,
            pipeline=self.pipeline,
            same_parts=self.same_parts,
            component=self.component,
            text_encoders=self.text_encoders,
            left_out=self.left_out,
            location=location,
            vae=self.vae,
            vae_revision=self.vae_revision,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def check(self) -> None:
        network = self._check_parts()
        check_trainable(self.parts.whole_network_config())
        self.noising()
        self.parts.check_weights(encoders=not self.takes_encodings)
        if self.takes_encodings and self.lora is None:
            self.parts.check_export()
        self._trained_network().check(network)

    def check_to_sample(self) -> None:
        """Raise ModelError for whatever can be known of sampling before weights are read."""
        self._check_parts()
        self.parts.check_weights()

    def check_image_size(self, size: tuple[int, int]) -> None:
        self.parts.latent_space().shape(size)

    @property
    def takes_encodings(self) -> bool:
        return self.encoders == "cached"

    def _check_parts(self) -> Any:
        """Raise ModelError unless the parts fit together; returns the network without weights."""
        parts = self.parts
        parts.check_class(components.kind_of(self))
        parts.check_autoencoder(weights=not self.takes_encodings)
        self.check_configs(parts.whole_network_config(), parts.encoder_configs())
        parts.check_channels()
        return parts.blank_network()

    def noising(self) -> AbstractNoising:
        """How the model was trained to be corrupted; reads its scheduler's configuration alone.

        Raises:
            ModelError: the configuration is missing or of a kind that is not supported.
        """
        return self.parts.noising()

    def scheduler(self, name: str | None = None) -> Any:
        """A scheduler of diffusers that samples by the model's noise schedule.

        Args:
            name: of a class of diffusers, with or without `Scheduler`; None is the model's own.

        Raises:
            ConfigError: the name is not of a sampler for this model.
        """
        return build_scheduler(self.parts.schedule, name)

    def schedule_arguments(self, latent_shape: tuple[int, int, int]) -> Mapping[str, Any]:
        """What the scheduler's `set_timesteps` is given next to the number of steps, for latents of
        (channels, height, width)."""
        return {}

    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> DiffusionModel:
        return load_to_train(
            self.parts,
            self._trained_network(),
            self.encoder_settings(),
            conditioner=self.conditioner,
            export=self._export,
            fingerprint=self._fingerprint(),
            device=device,
            compute_dtype=compute_dtype,
            reference=reference,
            trainable=trainable,
            sharder=sharder,
        )

    def check_sharding(self) -> None:
        self._trained_network().check_sharding()

    def load_to_sample(
        self, *, device: torch.device, dtype: torch.dtype, adapter: Path | None = None
    ) -> SampledModel:
        """Read the weights for sampling alone, as the backbone's own pipeline would hold them.

        Args:
            device: where everything goes.
            dtype: of all weights; the autoencoder stays in float32 where float16 breaks it.
            adapter: a `.safetensors` file in any published layout, from `locate_adapter`; it may
                change the text encoders too.

        Raises:
            ModelError: files are damaged, or do not belong together.
        """
        return load_to_sample(
            self.parts, conditioner=self.conditioner, device=device, dtype=dtype, adapter=adapter
        )

    def _trained_network(self) -> TrainedNetwork:
        return TrainedNetwork(
            lora=self.lora,
            adapter_layers=self.adapter_layers,
            component=self.component,
            attention=self.attention,
            fused_attention=self.fused_attention,
            gradient_checkpointing=self.gradient_checkpointing,
            channels_last=self.channels_last,
            quantization=self.quantization,
            compile=self.compile,
        )

    def encoder_settings(self) -> EncoderSettings:
        """How the frozen parts around the network are kept and run."""
        return EncoderSettings(
            vae_dtype=DTYPES[self.vae_dtype],
            images_at_once=self.images_per_encoding,
            posterior=self.posterior,
            kept=self.encoders,
            tiling=self.vae_tiling,
        )

    def opened(self, values: Mapping[str, Tensor]) -> Any:
        """The pipeline in float32 on the CPU, all weights of its network given by name, and without
        what training has no use for."""
        return self.parts.read(with_weights(self.parts.blank_network(), values))

    def _fingerprint(self) -> str:
        """Tells base weights and shape of the training from others; reads little of the files."""
        parts: list[Any] = [self.pipeline, *self.parts.identities()]
        parts += self.parts.schedule_identity(self.lora and replace(self.lora, start=None))
        parts += [part for part in (start_digest(self.lora), self.quantization) if part is not None]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def _export(self, folder: Path, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write `values`, the trained parameters of `network`, for the backbone's pipeline."""
        if self.lora is not None:
            kind = getattr(diffusers, self.pipeline)
            export_adapter(
                folder, kind, self.component, network, values, self.lora, self.kohya_lora
            )
        else:
            # Read anew: the encoders in memory were rounded to the precision of the run.
            write_pipeline(folder, self.opened({**network.state_dict(), **values}))

    def kohya_lora(
        self, layers: Mapping[str, LoraLayer], *, dtype: torch.dtype, title: str
    ) -> KohyaLora:
        """An adapter of this model as ComfyUI, A1111 and kohya's tools read it.

        Raises:
            ModelError: such a file cannot hold it.
        """
        return kohya_lora(
            layers,
            self.network_config,
            dtype=dtype,
            title=title,
            base=self.base_name,
            velocity=self.predicts_velocity,
        )

    @property
    def network_config(self) -> dict[str, Any]:
        """Of the network, as diffusers writes it."""
        return self.parts.network_config

    @property
    def base_name(self) -> str:
        """The hub id of the base, or what it is called on this disk: never a path."""
        path = self.path if self.unet is None else self.unet
        local = Path(path).expanduser()
        return local.resolve().name if local.exists() else path

    @property
    def predicts_velocity(self) -> bool:
        return self.parts.schedule.get("prediction_type") == "v_prediction"

    def describe(self) -> str:
        shape = "all weights" if self.lora is None else f"LoRA of rank {self.lora.rank}"
        start = f" from {in_words(self.lora.start)}" if self.lora and self.lora.start else ""
        base = in_words(Path(self.path)) if Path(self.path).is_dir() else self.path
        base += f" with the denoiser of {self.unet}" if self.unet else ""
        base += f" in {self.quantization}" if self.quantization else ""
        return f"{components.kind_of(self)} from {base}, training {shape}{start}"
