"""Stable Diffusion XL: two CLIP text encoders, and the size and crop of every image.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.2 (micro-conditioning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.models.diffusion.agreement import Config, check_unet
from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    Framing,
    PromptEmbeddings,
    token_ids,
)
from diffalign.models.diffusion.config import AbstractDiffusion

SizeConditioning = Literal["per_sample", "fixed"]


def time_ids(framing: Framing, *, size_conditioning: SizeConditioning) -> Tensor:
    """The six numbers that SDXL is told about an image, in the order of diffusers' pipeline.

    Returns:
        Float32 [n, 6]: original height and width, crop top and left, target height and width.
        Never in half precision, which cannot hold every size above 2048 (256 in bfloat16).
    """
    n = len(framing.original_sizes)
    target = torch.tensor(framing.target_size).expand(n, 2)
    if size_conditioning == "fixed":
        return torch.cat([target, torch.zeros_like(target), target], dim=1).float()
    original, corners = framing.original_sizes, framing.crop_corners
    return torch.cat([original, corners, target.to(original.device)], dim=1).float()


@dataclass(frozen=True)
class SDXLConditioner(AbstractConditioner):
    """Penultimate hidden states of both encoders side by side, the second one's pooled vector, and
    the framing of the image.

    A dropped caption is the encoded empty prompt, as in diffusers' and the Salesforce training
    scripts. `force_zeros_for_empty_prompt` of the pipeline concerns guidance alone.
    """

    tokenizers: tuple[Any, Any]
    text_encoders: tuple[Any, Any]
    size_conditioning: SizeConditioning
    zeros_when_unconditional: bool
    """Guidance steers away from zeros rather than from the encoded empty prompt."""

    @property
    def networks(self) -> Sequence[Any]:
        return self.text_encoders

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        outputs = [
            encoder(token_ids(tokenizer, prompts, encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        return PromptEmbeddings(
            hidden_states=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            pooled=outputs[1].text_embeds,
        )

    def unconditional(self) -> PromptEmbeddings:
        empty = self.encode([""])
        if not self.zeros_when_unconditional or empty.pooled is None:
            return empty
        return PromptEmbeddings(
            hidden_states=torch.zeros_like(empty.hidden_states),
            pooled=torch.zeros_like(empty.pooled),
        )

    def arguments(self, embeddings: PromptEmbeddings, framing: Framing) -> Mapping[str, Any]:
        ids = time_ids(framing, size_conditioning=self.size_conditioning)
        return {
            "encoder_hidden_states": embeddings.hidden_states,
            "added_cond_kwargs": {
                "text_embeds": embeddings.pooled,
                "time_ids": send(ids, embeddings.hidden_states.device),
            },
        }


@dataclass(frozen=True, kw_only=True)
class SDXL(AbstractDiffusion):
    """Settings of a Stable Diffusion XL model."""

    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    left_out: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    size_conditioning: SizeConditioning = "per_sample"
    """Tell the network each image's true size and crop, or `fixed`: as if every file had the size
    of training and nothing were cut off, as the DiffusionDPO launchers do."""

    def conditioner(self, pipeline: Any) -> AbstractConditioner:
        return SDXLConditioner(
            (pipeline.tokenizer, pipeline.tokenizer_2),
            (pipeline.text_encoder, pipeline.text_encoder_2),
            self.size_conditioning,
            zeros_when_unconditional=pipeline.config.force_zeros_for_empty_prompt,
        )

    def check_configs(self, network: Config, encoders: Mapping[str, Config]) -> None:
        check_unet(network, encoders, added="text_time")
