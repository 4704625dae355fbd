"""Open a model for generating, and generate: one place where evaluation touches diffusers'
pipelines.

Whatever a person has is opened: a diffusers folder, a hub id, a single checkpoint file, an adapter
with its base, or the folder of a training run. The noise of an image is a function of its prompt
and seed alone, so every model starts from the same noise, in whatever batches it generates.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffalign.commands import command
from diffalign.errors import ModelError
from diffalign.models.adapter_files import ADAPTER_FILE, locate_adapter
from diffalign.models.diffusion.agreement import check_channels
from diffalign.models.diffusion.autoencoder import Autoencoder
from diffalign.models.diffusion.conditioning import cut_prompts
from diffalign.models.diffusion.pipeline_lora import add_adapter
from diffalign.models.diffusion.schedulers import SCHEDULE_FILE, build_scheduler, model_schedule
from diffalign.models.locate import AbstractLocation, locate, with_network
from diffalign.models.precision import DTYPES, Precision, precision_of
from diffalign.models.runs import CONFIG, FINAL, checkpoint_at, is_run, model_of_run
from diffalign.seeding import cpu_generator, derive_seed

DtypeName = Literal["auto", Precision]

_INDEX = "model_index.json"
_ALL = 2**31
"""Of a batch, the user says how many are made at once."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where a model lies."""

    path: str
    """A diffusers folder, a hub id, a `.safetensors` checkpoint, or the folder of a training run,
    which represents its result (`final`), or while it has not finished for its newest checkpoint;
    or one of its checkpoints."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    variant: str | None = None
    """Which weight files to take where a folder has several, such as fp16."""
    config: str | None = None
    """For a single checkpoint, a folder or hub id of the same architecture."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the network predicts; null takes what the single file says of itself, then what the
    scheduler's configuration says."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep holds no image at all; null takes what the files say."""
    unet: str | None = None
    """Another denoiser in the place of the model's own: a folder or hub id that holds one, alone or
    in a folder `unet`, or a `.safetensors` file of one."""
    unet_revision: str | None = None
    """Commit, branch or tag of that denoiser's hub id."""
    lora: Path | None = None
    """An adapter for the model at `path`: a `.safetensors` file, or a folder that holds one."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How an image is generated; the same for every model of a comparison."""

    steps: int = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less turns guidance off. 5 is SDXL's usual value, 7.5
    that of SD 1.5."""
    scheduler: str | None = None
    """Name of a diffusers scheduler, such as DDIM or EulerDiscrete; null keeps the model's own. All
    follow the model's noise schedule, and none clips latents."""
    eta: float = 0.0
    """Noise that DDIM adds back at each step, 0 to 1; other schedulers ignore it."""
    negative_prompt: str | None = None
    """What to steer away from; null is the pipeline's own empty prompt."""
    height: int | None = None
    """Of the images, pixels; null is the model's own size."""
    width: int | None = None
    """Of the images, pixels; null is the model's own size."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}")
        for name, length in (("height", self.height), ("width", self.width)):
            if length is not None and (length < 8 or length % 8):
                raise ValueError(f"{name} must be a multiple of 8 pixels, got {length}")


@dataclass(frozen=True)
class LocatedModel:
    """A model that is known to be there, before its weights are read."""

    location: AbstractLocation
    lora: Path | None
    """One `.safetensors` file."""
    prediction_type: str | None = None
    """In place of what the files say."""
    zero_terminal_snr: bool | None = None
    """In place of what the files say."""

    @cached_property
    def schedule(self) -> dict[str, Any]:
        """The scheduler's configuration: what the files say, and then the settings."""
        return model_schedule(
            self.location,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def fingerprint(self) -> str:
        """Identifies the weights and their schedule: 16 hexadecimal digits."""
        parts = [self.location.identity(name) for name in self._networks()]
        written = self.location.read_json(SCHEDULE_FILE)
        parts.append(str(sorted(written.items())))
        if self.prediction_type is not None:
            parts.append(self.prediction_type)
        elif self.schedule != written:
            parts.append(str(sorted(self.schedule.items())))
        if self.lora is not None:
            parts.append(hashlib.blake2b(self.lora.read_bytes()).hexdigest())
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def check(self) -> None:
        """Raise ModelError for whatever is missing, without reading weights."""
        index = self.location.read_json(_INDEX)
        kind = _pipeline_class(index)
        taken = inspect.signature(kind.__call__).parameters
        parts = inspect.signature(kind.__init__).parameters
        if "image" in taken or "latents" not in taken or "unet" not in parts:
            raise ModelError(
                f"{self.location} is a {kind.__name__}, which does not make images of prompts by a "
                f"UNet alone: give a StableDiffusionPipeline or a StableDiffusionXLPipeline"
            )
        check_channels(
            self.location.read_json("unet/config.json"), self.location.read_json("vae/config.json")
        )
        for name in self._networks():
            self.location.check_weights(name)

    def notes(self) -> list[str]:
        """What a person should know of how the model is read, a line each."""
        written = self.location.read_json(SCHEDULE_FILE)
        changed = {k: v for k, v in self.schedule.items() if written.get(k) != v}
        if not changed:
            return []
        return [
            f"{', '.join(f'{key} is {value}' for key, value in changed.items())}, in place of what "
            f"its {SCHEDULE_FILE} says"
        ]

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raise DiffalignError if its images cannot be sampled so, without reading weights."""
        build_scheduler(self.schedule, sampler.scheduler)
        size = self.location.read_json("unet/config.json").get("sample_size")
        if size is None and None in (sampler.height, sampler.width):
            raise ModelError(
                f"{self.location}: unet/config.json has no sample_size, so the size of its images "
                f"is not known: set sampler.height and sampler.width"
            )

    def read(self) -> Any:
        """The pipeline in float32, without safety checker and watermark."""
        index = self.location.read_json(_INDEX)
        pipeline = _pipeline_class(index)
        options: dict[str, Any] = {}
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if "add_watermarker" in inspect.signature(pipeline.__init__).parameters:
            options["add_watermarker"] = False
        return self.location.load(pipeline, **options)

    def _networks(self) -> list[str]:
        """Names of the components that have weights, those that are not used left out."""
        index = self.location.read_json(_INDEX)
        return [
            name
            for name, origin in index.items()
            if isinstance(origin, list)
            and origin[0] is not None
            and name.startswith(("unet", "transformer", "vae", "text_encoder"))
        ]


def _pipeline_class(index: Mapping[str, Any]) -> Any:
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise ModelError(
            f"{_INDEX} names the pipeline {name!r}, which the installed diffusers lacks"
        )
    return found


def locate_model(spec: ModelSpec) -> LocatedModel:
    """Find a model's files; of a hub id, the configurations are fetched.

    Raises:
        ModelError: nothing of the kind is there, a part is missing, or it is a pickle.
    """
    spec = without_run(spec)
    location = locate(spec.path, revision=spec.revision, variant=spec.variant, config=spec.config)
    if spec.unet is not None:
        location = with_network(location, spec.unet, revision=spec.unet_revision)
    model = LocatedModel(location, spec.lora, spec.prediction_type, spec.zero_terminal_snr)
    model.check()
    return model


def without_run(spec: ModelSpec) -> ModelSpec:
    """The same model in terms of what lies there: a base, and the file of an adapter if any.

    A run is what it trained, one that has not finished what its newest checkpoint holds.

    Raises:
        ModelError: a run without a checkpoint, or an adapter where a base belongs.
    """
    path = Path(spec.path).expanduser()
    lora = locate_adapter(spec.lora) if spec.lora is not None else None
    checkpoint = checkpoint_at(path)
    if checkpoint is None and is_run(path) and not (path / FINAL).is_dir():
        raise ModelError(
            f"{path}: this run has neither finished nor saved a checkpoint. Continue it with: "
            + command("train", config=path / CONFIG, options=["--resume"])
        )
    if checkpoint is not None or is_run(path):
        run = path if checkpoint is None else checkpoint.run
        if checkpoint is None and (path / FINAL / _INDEX).is_file():
            return ModelSpec(path=str(path / FINAL), lora=lora)
        model = model_of_run(run)
        if checkpoint is not None and not model.get("lora"):
            return ModelSpec(path=str(checkpoint.folder), lora=lora)
        if lora is not None:
            raise ModelError(f"{path} is itself of a run that trained an adapter: leave lora out")
        return replace(_base_of_run(model), lora=locate_adapter(path))
    if (path / ADAPTER_FILE).is_file():
        raise ModelError(f"{path} is an adapter: give it as lora, and its base as path")
    return replace(spec, lora=lora)


def _base_of_run(model: Mapping[str, Any]) -> ModelSpec:
    """What a run started from, as its config names it."""
    kept = ("revision", "variant", "config", "unet", "unet_revision")
    schedule = ("prediction_type", "zero_terminal_snr")
    return ModelSpec(path=str(model["path"]), **{key: model.get(key) for key in (*kept, *schedule)})


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The named type, or for `auto` half precision where the device is a GPU."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def sampler_settings(sampler: SamplerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Everything next to model, prompt and seed that shapes an image, as a manifest keeps it."""
    return {**asdict(sampler), "dtype": precision_of(dtype)}


class TextToImage:
    """One opened model with one way of sampling."""

    def __init__(self, pipeline: Any, sampler: SamplerConfig) -> None:
        self.pipeline = pipeline
        self.sampler = sampler
        self._autoencoder = Autoencoder(pipeline.vae, images_at_once=_ALL)
        self._embeddings: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(
        cls,
        model: LocatedModel,
        sampler: SamplerConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> TextToImage:
        """Read the weights: no pickles, no code from the model's folder, no safety checker, no
        watermark.

        Raises:
            ModelError: the files do not make a text-to-image pipeline.
            ConfigError: the sampler names no scheduler of diffusers.
        """
        scheduler = build_scheduler(model.schedule, sampler.scheduler)
        try:
            pipeline = model.read()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{model.location}: cannot be opened as a pipeline: {error}"
            ) from error
        pipeline.scheduler = scheduler
        if model.lora is not None:
            # Half precision would round away much of a small change, so there it stays separate.
            add_adapter(pipeline, model.lora, merge=dtype == torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        upcast = dtype == torch.float16 and pipeline.vae.config.force_upcast
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                kept = torch.float32 if upcast and part is pipeline.vae else dtype
                part.to(device, None if kept == torch.float32 else kept)
        return cls(pipeline, sampler)

    def truncated(self, texts: Iterable[str]) -> list[str]:
        """The prompts that are longer than the text encoder reads."""
        texts = list(texts)
        cut = set(cut_prompts([self.pipeline.tokenizer], texts).cut)
        return [text for text in texts if text in cut]

    @torch.inference_mode()
    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Generate one image a row; a row does not depend on its neighbours beyond float rounding.

        Args:
            texts: prompts, n of them.
            seeds: one per prompt.

        Returns:
            Shape [n, 3, H, W], float32 in [-1, 1], on the CPU; not finite where the model broke.

        Raises:
            ModelError: the autoencoder made values that are not finite of latents that were.
        """
        generators = [
            cpu_generator(derive_seed("picture", text, seed))
            for text, seed in zip(texts, seeds, strict=True)
        ]
        shape = self._latent_shape()
        latents = torch.stack([torch.randn(shape, generator=item) for item in generators])
        latents = self.pipeline(
            **self._conditions(texts),
            latents=latents.to(self.pipeline.device, self.pipeline.unet.dtype),
            generator=generators,  # for schedulers that add noise at each step
            num_inference_steps=self.sampler.steps,
            guidance_scale=self.sampler.guidance,
            eta=self.sampler.eta,
            height=shape[1] * self.pipeline.vae_scale_factor,
            width=shape[2] * self.pipeline.vae_scale_factor,
            output_type="latent",  # the pipelines ignore most of what an autoencoder's config says
        ).images
        images = self._autoencoder.decode(latents).clamp(-1.0, 1.0).cpu()
        if reason := self._autoencoder.blame():
            raise ModelError(reason)
        return images

    def _latent_shape(self) -> tuple[int, int, int]:
        unet, factor = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        size = unet.sample_size
        own = size if isinstance(size, (list, tuple)) else (size, size)
        height, width = (
            length // factor if length else usual
            for length, usual in zip((self.sampler.height, self.sampler.width), own, strict=True)
        )
        return unet.in_channels, height, width

    def _conditions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of a batch. Those of the batch before are kept, since a prompt's images
        stand together."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        kept = {text: self._embeddings[text] for text in texts if text in self._embeddings}
        self._embeddings = kept | (self._encode(new) if new else {})
        rows = [self._embeddings[text] for text in texts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, texts: list[str]) -> dict[str, dict[str, Tensor]]:
        negative = self.sampler.negative_prompt
        encoded = self.pipeline.encode_prompt(
            prompt=texts,
            device=self.pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.sampler.guidance > 1,
            negative_prompt=None if negative is None else [negative] * len(texts),
        )
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )  # SD 1.5 returns the first two only
        given = [
            (name, rows) for name, rows in zip(names, encoded, strict=False) if rows is not None
        ]
        return {text: {name: rows[i] for name, rows in given} for i, text in enumerate(texts)}
