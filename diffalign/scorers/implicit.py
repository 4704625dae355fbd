"""The reward that a trained model itself has of an image: its log-ratio to what it started from.

Training by DPO makes a policy a reward model without a head: beta times the log-ratio of policy and
reference. Of a diffusion model the log-likelihood is the surrogate that it was trained with, minus
half the denoising error; here it is the mean over timesteps and noise that are the same for all
images, so that a score depends on nothing but the image and its prompt.

Source: Rafailov et al. 2023, arXiv:2305.18290, section 4; Wallace et al. 2023, arXiv:2311.12908,
eq. 14, which is an expectation over the same timesteps and noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.config import MUST_STAY
from diffalign.errors import ConfigError
from diffalign.generation.models import ModelSpec, base_of_run, diffusion_settings, locate_model
from diffalign.imaging.image_files import pixels_of
from diffalign.models.devices import DTYPES, Precision, send
from diffalign.models.diffusion.conditioning import Framing
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.runs import checkpoint_at, is_run
from diffalign.ranges import AtLeast, MoreThan
from diffalign.scorers.images import AbstractImageScorer
from diffalign.seeding import derive_seed, noise_from_seeds


@dataclass(frozen=True, kw_only=True)
class Implicit(AbstractImageScorer):
    """beta / 2 times the mean of (error under the reference - error under the policy): above 0
    where the policy finds an image more probable than its reference does."""

    policy: str = field(metadata=MUST_STAY)
    """The folder of a run that trained an image model, one of its checkpoints, or a model folder or
    hub id."""
    reference: str | None = field(default=None, metadata=MUST_STAY)
    """Likewise; null is what the run at `policy` started from."""
    beta: Annotated[float, MoreThan(0)]
    """Of the objective that the policy was trained by, such as 5000 for Diffusion-DPO: it makes the
    difference of two scores the log-odds that the policy was trained to. Which image is preferred
    does not depend on it."""
    timesteps: Annotated[int, AtLeast(1)] = 8
    """At how many times errors are measured: the middles of as many equal parts of the schedule."""
    noises: Annotated[int, AtLeast(1)] = 2
    """Samples of noise at each of them."""
    precision: Precision = "float32"
    """In which the networks compute."""
    images_per_batch: Annotated[int, AtLeast(1)] = 8
    """Images in one pass of a network, which bounds its memory."""

    @cached_property
    def fingerprint(self) -> str:
        parts: list[Any] = [locate_model(spec).fingerprint() for spec in self._specs]
        parts += [self.beta, self.timesteps, self.noises, self.precision]
        return f"implicit-{hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores of images of one size.

        Raises:
            ValueError: the autoencoder takes no images of this size.
            ConfigError, ModelError: the models cannot be opened.
        """
        size = self.images_per_batch
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return torch.cat([self._score(images[part], prompts[part]) for part in parts])

    def to(self, device: torch.device | str) -> Implicit:
        if self._device != [torch.device(device)]:
            self._device[:] = [torch.device(device)]
            self._loaded.clear()
        return self

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([pixels_of(image) for image in images])
        reference = self._error("reference", pixels, prompts)
        return 0.5 * self.beta * (reference - self._error("policy", pixels, prompts))

    def _error(self, of: str, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean squared error of a model, over all timesteps and noise, shape [n]."""
        model, is_reference = self._model(of)
        noising, count = model.noising, len(pixels)
        height, width = pixels.shape[-2:]
        model.latent_space.shape((height, width))  # refuses what the autoencoder cannot take
        framing = Framing(
            original_sizes=torch.tensor([(height, width)] * count),
            crop_corners=torch.zeros(count, 2, dtype=torch.long),
            target_size=(height, width),
        )
        clean = model.autoencoder.encode(pixels, [0] * count)  # the mean: no seed is used
        conditioning = model.prompts.framed(prompts, framing)
        errors = []
        with model.reference() if is_reference else nullcontext(), model.sampling():
            for part, number in product(range(self.timesteps), range(self.noises)):
                middle = math.floor((part + 0.5) / self.timesteps * noising.schedule_length)
                t = torch.full((count,), middle, dtype=torch.float64)
                seed = derive_seed("implicit reward", part, number)
                noise = send(noise_from_seeds([seed], tuple(clean.shape[1:])), clean.device)
                noise = noise.expand_as(clean)
                time = send(noising.network_time(t), clean.device)
                found = model.predict(noising.corrupt(clean, noise, t), time, conditioning)
                error = found.float() - noising.target(clean, noise, t).float()
                errors.append(error.square().flatten(start_dim=1).mean(dim=1))
        return torch.stack(errors).mean(dim=0)

    def _model(self, of: str) -> tuple[DiffusionModel, bool]:
        """The loaded model, and whether it is that model's own reference that is meant."""
        settings = self._settings
        if of == "reference" and self._is_adapter_off:
            return self._model("policy")[0], True
        if of not in self._loaded:
            self._loaded[of] = settings[of].load(
                device=self._device[0],
                compute_dtype=DTYPES[self.precision],
                reference="adapter_off" if self._is_adapter_off else "none",
                trainable=False,
            )
        return self._loaded[of], False

    @cached_property
    def _settings(self) -> dict[str, Any]:
        names = ("policy", "reference")
        return {
            name: replace(diffusion_settings(spec), posterior="mean")
            for name, spec in zip(names, self._specs, strict=True)
        }

    @cached_property
    def _is_adapter_off(self) -> bool:
        """Whether the reference is the policy without its adapter: one network does for both."""
        policy, reference = self._settings["policy"], self._settings["reference"]
        return policy.lora is not None and replace(policy, lora=None) == reference

    @cached_property
    def _specs(self) -> tuple[ModelSpec, ModelSpec]:
        policy = ModelSpec(path=self.policy)
        if self.reference is not None:
            return policy, ModelSpec(path=self.reference)
        folder = Path(self.policy).expanduser()
        checkpoint = checkpoint_at(folder)
        run = folder if checkpoint is None else checkpoint.run
        if folder.name == "final" and is_run(folder.parent):
            run = folder.parent
        if not is_run(run):
            raise ConfigError(
                f"the policy of the scorer implicit is {self.policy}, which is no training run, so "
                f"what it started from is unknown: give scorer.reference"
            )
        return policy, base_of_run(run)

    @cached_property
    def _device(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @cached_property
    def _loaded(self) -> dict[str, DiffusionModel]:
        return {}
