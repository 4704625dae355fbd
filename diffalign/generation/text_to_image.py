"""Generate images of prompts with an opened model.

The noise of an image is a function of its prompt and seed alone, so every model starts from the
same noise, in whatever batches it generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.generation.models import LocatedModel
from diffalign.models.devices import DTYPES, Precision, precision_of
from diffalign.models.diffusion.autoencoder import LatentSpace
from diffalign.models.diffusion.sampling import Samplable, sample
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.seeding import cpu_generator, derive_seed

DtypeName = Literal["auto", Precision]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Ranged):
    """How an image is generated; the same for every model of a comparison."""

    steps: Annotated[int, AtLeast(1)] = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less turns guidance off. 5 is SDXL's usual value, 7.5
    that of SD 1.5."""
    scheduler: str | None = None
    """Name of a diffusers scheduler, such as DDIM or EulerDiscrete; null keeps the model's own. All
    follow the model's noise schedule, and none clips latents."""
    eta: Annotated[float, Between(0, 1)] = 0.0
    """Noise that DDIM adds back at each step, 0 to 1; other schedulers ignore it."""
    negative_prompt: str | None = None
    """What to steer away from; null is the pipeline's own empty prompt."""
    height: int | None = None
    """Of the images, pixels; null is the model's own size."""
    width: int | None = None
    """Of the images, pixels; null is the model's own size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, length in (("height", self.height), ("width", self.width)):
            if length is not None and (length < 8 or length % 8):
                raise ValueError(f"{name} must be a multiple of 8 pixels, got {length}")

    def size_for(self, space: LatentSpace) -> tuple[int, int]:
        """(height, width) of the images in pixels.

        Raises:
            ValueError: it is not given, and the model does not say its own.
        """
        if self.height is not None and self.width is not None:
            return self.height, self.width
        height, width = space.image_size
        return self.height or height, self.width or width


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The named type, or for `auto` half precision where the device is a GPU."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def sampler_settings(sampler: SamplerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Everything next to model, prompt and seed that shapes an image, as a manifest keeps it."""
    return {**asdict(sampler), "dtype": precision_of(dtype)}


def check_sampler(model: LocatedModel, sampler: SamplerConfig) -> None:
    """Raise ConfigError if a model's images cannot be sampled so, without reading weights."""
    model.settings.scheduler(sampler.scheduler)
    space = model.settings.parts.latent_space()
    try:
        space.shape(sampler.size_for(space))
    except ValueError as error:
        raise ConfigError(
            f"sampler.height, sampler.width: {model.settings.path}: {error}"
        ) from error


class TextToImage:
    """One opened model with one way of sampling."""

    def __init__(
        self,
        model: Samplable,
        scheduler: Any,
        sampler: SamplerConfig,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            model: to be sampled from; one in training belongs within its `sampling()`.
            scheduler: of diffusers, configured for the model's noise schedule.
            sampler: steps, guidance and size.
            schedule: from the settings' `schedule_arguments`.
        """
        self.model = model
        self.scheduler = scheduler
        self.sampler = sampler
        self._schedule = schedule
        self._size = sampler.size_for(model.latent_space)
        self._shape = model.latent_space.shape(self._size)

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
            ModelError: the files do not make a text-to-image model.
            ConfigError: the sampler names no scheduler of diffusers, or an impossible size.
        """
        check_sampler(model, sampler)
        settings = model.settings
        space = settings.parts.latent_space()
        return cls(
            settings.load_to_sample(device=device, dtype=dtype, adapter=model.lora),
            settings.scheduler(sampler.scheduler),
            sampler,
            settings.schedule_arguments(space.shape(sampler.size_for(space))),
        )

    @torch.no_grad()  # inference mode would leave its tensors in the caches of a model in training
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
        noise = torch.stack([torch.randn(self._shape, generator=each) for each in generators])
        autoencoder = self.model.autoencoder
        latents = sample(
            self.model.denoiser(
                texts,
                guidance=self.sampler.guidance,
                size=self._size,
                negative_prompt=self.sampler.negative_prompt,
            ),
            noise.to(autoencoder.device, self.model.latent_dtype),
            self.scheduler,
            steps=self.sampler.steps,
            eta=self.sampler.eta,
            generators=generators,  # for schedulers that add noise at each step
            schedule=self._schedule,
        )
        images = autoencoder.decode(latents).cpu()
        if reason := autoencoder.blame():
            raise ModelError(reason)
        return images
