"""The step-aware preference model in training: a time-conditioned CLIP next to a diffusion model.

It learns which of two images is preferred when both are seen through one denoising step of the
diffusion model whose trajectories it will score.

Source: Liang et al. 2024, arXiv:2406.04314; RockeyCoss/SPO, step_aware_preference_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign import components
from diffalign.commands import command
from diffalign.config import MAY_CHANGE
from diffalign.errors import ModelError
from diffalign.models.base import AbstractModel, AbstractTrainable, ReferenceKind
from diffalign.models.devices import send
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.export import replacing
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractNoising, AbstractVariancePreserving
from diffalign.models.preference.clip_loading import (
    WEIGHTS,
    digest_of_weights,
    read_clip,
    read_config,
    read_tokenizer,
    tokenize,
)
from diffalign.models.preference.time_conditioned_clip import TimeConditionedCLIP
from diffalign.models.sharding import Sharder
from diffalign.ranges import AtLeast


class StepAwareModel(AbstractTrainable):
    """A time-conditioned CLIP in training, with the frozen diffusion model that it scores."""

    def __init__(
        self,
        *,
        network: TimeConditionedCLIP,
        tokenizer: Any,
        base: DiffusionModel,
        guidance: float,
        compute_dtype: torch.dtype,
        fingerprint: str,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: what requires grad in it is what trains.
            tokenizer: of its text tower.
            base: predicts what the network scorers; frozen.
            guidance: of those predictions.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            fingerprint: see `AbstractTrainable`.
        """
        self.network: nn.Module = network
        self.base = base
        self.guidance = guidance
        self.tokenizer = tokenizer
        self.device = base.device
        self.evaluations = 0
        self.image_size = network.image_size
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._compute_dtype = compute_dtype
        self._fingerprint = fingerprint

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as the text tower takes them, int64 [n, tokens]."""
        ids = tokenize(self.tokenizer, prompts, length=self._unwrapped.text_length)
        return send(ids, self.device)

    def scores(self, pixels: Tensor, t: Tensor, tokens: Tensor, text_rows: Tensor) -> Tensor:
        """The network's scores, float32 [n]: see `TimeConditionedCLIP.forward`."""
        self.evaluations += len(pixels)
        reduced = self._compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced):
            scores: Tensor = self.network(pixels, t, tokens, text_rows)
        return scores

    def reference(self) -> AbstractContextManager[None]:
        raise ValueError("a preference model is compared with nothing: set reference to none")

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._unwrapped.named_parameters() if p.requires_grad)

    def blame(self) -> str | None:
        return self.base.blame()

    def fingerprint(self) -> str:
        return self._fingerprint

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what the scorer `step_aware` reads: weights, configuration, tokenizer.

        Args:
            folder: replaced as a whole.
            state: values for all trained parameters by name; the current ones if None.
        """
        weights = {**self._unwrapped.state_dict(), **(state or {})}
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        with replacing(folder) as partial:
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
            self._unwrapped.model.config.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)


@dataclass(frozen=True, kw_only=True)
class StepAwarePreference(AbstractModel):
    """Fine-tunes a CLIP that scores clean images into one that scores at any noise level."""

    path: str = field(metadata=MAY_CHANGE)
    """The plain scorer to start from: a CLIP's folder or hub id, such as
    `yuvalkirstain/PickScore_v1`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it does not lie next to the CLIP."""
    base: AbstractDiffusion
    """The diffusion model whose one-step predictions are scored; it stays as it is."""
    guidance: Annotated[float, AtLeast(1, "1 is none")] = 5.0
    """Scale of classifier-free guidance of those predictions; that of the sampling to be scored."""
    towers: Literal["all", "vision"] = "all"
    """The trained part: both towers, or the vision tower with its modulation alone."""
    seed: int = 0
    """Of the time embedding's initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.lora is not None:
            raise ValueError("base.lora adapts a model that is not trained here: leave it out")
        if self.base.takes_encodings:
            raise ValueError(
                "base.encoders is cached, and scores are of images that the base makes of noise: "
                "its autoencoder and text encoders are needed, set it to resident"
            )

    @property
    def trains_adapter(self) -> bool:
        return False

    def describe(self) -> str:
        what = "both towers" if self.towers == "all" else "the vision tower"
        return (
            f"step-aware preference model from {self.path}, training {what}; scorers predictions "
            f"of {self.base.path} at guidance {self.guidance:g}"
        )

    @property
    def library(self) -> str:
        return "diffalign"

    def usage(self, folder: str) -> str:
        return (
            f"from diffalign.scorers.step_aware import StepAware\n\n"
            f'scorer = StepAware(path="{folder}")'
        )

    def next_step(self, run: Path) -> str:
        return "Let it score the steps that SPO compares:\n  " + command(
            "train",
            {"rollouts.scorer": {"kind": "step_aware", "path": run / "final"}},
            config=f"configs/spo/{components.kind_of(self.base)}.yaml",
        )

    def check(self) -> None:
        read_config(self.path, revision=self.revision, field="path")
        self._read_tokenizer()
        self.base.check()
        if not isinstance(self.noising(), AbstractVariancePreserving):
            raise ModelError(
                f"base: {self.base.path} follows a straight path, and one-step predictions are "
                "defined here for models with a beta schedule, such as SD 1.5 and SDXL"
            )

    def tokenizers(self) -> list[Any]:
        return [self._read_tokenizer(), *self.base.tokenizers()]

    def noising(self) -> AbstractNoising:
        """How images are noised: as the base was trained.

        Raises:
            ModelError: see `AbstractDiffusion.noising`.
        """
        return self.base.noising()

    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> StepAwareModel:
        if reference != "none":
            raise ModelError(
                f"a preference model has no reference, and reference is {reference}: use none"
            )
        clip = read_clip(self.path, revision=self.revision, field="path")
        start = digest_of_weights(clip)
        network = TimeConditionedCLIP(clip, seed=self.seed)
        network.requires_grad_(trainable and self.towers == "all")
        for part in (clip.vision_model, clip.visual_projection, clip.t_embedder):
            part.requires_grad_(trainable)
        base = self.base.load(
            device=device, compute_dtype=compute_dtype, reference="none", trainable=False
        )
        base.network.eval()
        parts = [start, base.fingerprint(), self.towers]
        return StepAwareModel(
            network=network.to(device).train(),
            tokenizer=self._read_tokenizer(),
            base=base,
            guidance=self.guidance,
            compute_dtype=compute_dtype,
            fingerprint=hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest(),
        )

    def _read_tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer, field="tokenizer")
        return read_tokenizer(self.path, revision=self.revision, field="path")
