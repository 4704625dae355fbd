"""Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.models.diffusion.agreement import Config, check_unet
from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    Framing,
    PromptEmbeddings,
    token_ids,
)
from diffalign.models.diffusion.config import AbstractDiffusion


@dataclass(frozen=True)
class SD15Conditioner(AbstractConditioner):
    """Last hidden states of the one encoder; the framing of the image is not told."""

    tokenizer: Any
    text_encoder: Any

    @property
    def networks(self) -> Sequence[Any]:
        return (self.text_encoder,)

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        ids = token_ids(self.tokenizer, prompts, self.text_encoder.device)
        return PromptEmbeddings(hidden_states=self.text_encoder(ids)[0])

    def unconditional(self) -> PromptEmbeddings:
        return self.encode([""])

    def arguments(self, embeddings: PromptEmbeddings, framing: Framing) -> Mapping[str, Any]:
        return {"encoder_hidden_states": embeddings.hidden_states}


@dataclass(frozen=True, kw_only=True)
class SD15(AbstractDiffusion):
    """Settings of a Stable Diffusion 1.x or 2.x model."""

    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    left_out: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    same_parts: ClassVar[tuple[str, ...]] = ("LatentConsistencyModelPipeline",)

    def conditioner(self, pipeline: Any) -> AbstractConditioner:
        return SD15Conditioner(pipeline.tokenizer, pipeline.text_encoder)

    def check_configs(self, network: Config, encoders: Mapping[str, Config]) -> None:
        check_unet(network, encoders, added=None)
