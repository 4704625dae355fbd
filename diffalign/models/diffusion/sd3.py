"""Stable Diffusion 3 and 3.5: a transformer of images and text, three text encoders, a straight
path.

Source: Esser et al. 2024, arXiv:2403.03206 (MMDiT, its text encoders, logit-normal times, shift).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.errors import ModelError
from diffalign.models.diffusion.agreement import Config
from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    Framing,
    PromptEmbeddings,
    token_ids,
)
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.lora import Scope
from diffalign.timesteps import ResolutionShift

_NETWORK = "SD3Transformer2DModel"
_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_CLIP_TOKENS = 77
"""Where no CLIP tokenizer is there to say it."""
_T5_TOKENS = 256
"""What the pipeline of diffusers lets T5 read."""


@dataclass(frozen=True)
class SD3Conditioner(AbstractConditioner):
    """Penultimate hidden states of both CLIP encoders side by side, and below them those of T5; the
    pooled vectors of both CLIP encoders. The framing of the image is not told.

    An encoder that is not there is represented by zeros of its width, so that the network finds
    what remains where it learned it. Diffusers' pipeline does so for T5 and opens no other gap.
    """

    tokenizers: Mapping[str, Any]
    """Of the encoders that are there, by the names of the encoders."""
    text_encoders: Mapping[str, Any]
    """Those that are there, by name."""
    widths: Mapping[str, int]
    """Of the vectors of either CLIP encoder, whether it is there or not."""
    joint_width: int
    """Of the vectors that the network reads."""
    autoencoder: Any
    """Says where zeros belong where there is no encoder at all."""

    @property
    def networks(self) -> Sequence[Any]:
        return tuple(self.text_encoders.values())

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        clips = [self._clip(name, prompts) for name in _CLIPS]
        hidden = torch.cat([states for states, _ in clips], dim=-1)
        hidden = pad(hidden, (0, self.joint_width - hidden.shape[-1]))
        t5 = self._t5(prompts)
        dtype = torch.promote_types(hidden.dtype, t5.dtype)
        return PromptEmbeddings(
            hidden_states=torch.cat([hidden.to(dtype), t5.to(dtype)], dim=-2),
            pooled=torch.cat([pooled for _, pooled in clips], dim=-1),
        )

    def _clip(self, name: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [n, tokens, width] and pooled vectors [n, width] of one encoder."""
        encoder = self.text_encoders.get(name)
        tokens = self._clip_tokens()
        if encoder is None:
            n, width = len(prompts), self.widths[name]
            return self._zeros(n, tokens, width), self._zeros(n, width)
        ids = token_ids(self.tokenizers[name], prompts, encoder.device, tokens=tokens)
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def _clip_tokens(self) -> int:
        """How many both CLIP encoders read: what the first one's tokenizer says."""
        found = (self.tokenizers[name] for name in _CLIPS if name in self.tokenizers)
        return next((tokenizer.model_max_length for tokenizer in found), _CLIP_TOKENS)

    def _t5(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states of T5, [n, tokens, width]."""
        encoder = self.text_encoders.get(_T5)
        if encoder is None:
            return self._zeros(len(prompts), _T5_TOKENS, self.joint_width)
        ids = token_ids(self.tokenizers[_T5], prompts, encoder.device, tokens=_T5_TOKENS)
        hidden: Tensor = encoder(ids)[0]
        return hidden

    def _zeros(self, *shape: int) -> Tensor:
        like = next(iter(self.text_encoders.values()), None)
        if like is None:
            return torch.zeros(shape, device=self.autoencoder.device)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def unconditional(self) -> PromptEmbeddings:
        return self.encode([""])

    def arguments(self, embeddings: PromptEmbeddings, framing: Framing) -> Mapping[str, Any]:
        return {
            "encoder_hidden_states": embeddings.hidden_states,
            "pooled_projections": embeddings.pooled,
        }


@dataclass(frozen=True, kw_only=True)
class SD3(AbstractDiffusion):
    """Settings of a Stable Diffusion 3 or 3.5 model."""

    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    left_out: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    text_encoders: ClassVar[tuple[str, ...]] = (*_CLIPS, _T5)
    component: ClassVar[str] = "transformer"
    adapter_layers: ClassVar[Scope] = Scope(
        (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        )
    )
    fused_attention: ClassVar[type | None] = None
    original_layout: ClassVar[bool] = False

    def conditioner(self, pipeline: Any) -> AbstractConditioner:
        parts, network = pipeline.components, pipeline.transformer.config
        encoders = {name: parts[name] for name in self.text_encoders if parts[name] is not None}
        return SD3Conditioner(
            tokenizers={
                name: parts[name.replace("text_encoder", "tokenizer")] for name in encoders
            },
            text_encoders=encoders,
            widths=clip_widths(
                network, {name: part.config.to_dict() for name, part in encoders.items()}
            ),
            joint_width=network["joint_attention_dim"],
            autoencoder=pipeline.vae,
        )

    def check_configs(self, network: Config, encoders: Mapping[str, Config]) -> None:
        if network.get("_class_name") != _NETWORK:
            raise ModelError(
                f"transformer/config.json is of {network.get('_class_name')!r}, which is called in "
                f"another way than a {_NETWORK}"
            )
        if not isinstance(network["sample_size"], int):
            raise ModelError(
                f"transformer/config.json has sample_size {network['sample_size']!r}: it must be "
                f"the side of its latents (128 for images of 1024 pixels)"
            )
        joint = network["joint_attention_dim"]
        if _T5 in encoders and encoders[_T5].get("d_model") != joint:
            raise ModelError(
                f"transformer/config.json has joint_attention_dim {joint}, and {_T5} writes "
                f"vectors of width {encoders[_T5].get('d_model')}: they were not made for each "
                f"other"
            )
        widths = clip_widths(network, encoders)
        hidden = sum(
            encoders[name]["hidden_size"] if name in encoders else widths[name] for name in _CLIPS
        )
        if hidden > joint:
            raise ModelError(
                f"transformer/config.json has joint_attention_dim {joint}, and the vectors of "
                f"{' and '.join(_CLIPS)} are {hidden} wide together: they were not made for each "
                f"other"
            )

    def absent_parts(self) -> tuple[str, ...]:
        return self.parts.absent()

    def schedule_arguments(self, latent_shape: tuple[int, int, int]) -> Mapping[str, Any]:
        schedule, patch = self.parts.schedule, self.parts.network_config.get("patch_size", 2)
        if not schedule.get("use_dynamic_shifting"):
            return {}
        shift = ResolutionShift(
            base=schedule.get("base_shift", 0.5),
            max=schedule.get("max_shift", 1.15),
            base_tokens=schedule.get("base_image_seq_len", 256),
            max_tokens=schedule.get("max_image_seq_len", 4096),
        )
        _, height, width = latent_shape
        return {"mu": shift.mu((height // patch) * (width // patch))}


def clip_widths(network: Config, encoders: Mapping[str, Config]) -> dict[str, int]:
    """How wide the vectors of each CLIP encoder are; of one that is not there, what the network's
    pooled vector leaves for it, as in SD3 an encoder's hidden and pooled vectors are equally wide.

    Args:
        network: the transformer's configuration.
        encoders: those of the encoders that are there, by name.

    Raises:
        ModelError: the network reads pooled vectors of another width.
    """
    total = network["pooled_projection_dim"]
    known = {name: encoders[name]["projection_dim"] for name in _CLIPS if name in encoders}
    rest = total - sum(known.values())
    if rest < 0 or (rest > 0 and len(known) == len(_CLIPS)):
        raise ModelError(
            f"transformer/config.json has pooled_projection_dim {total}, and "
            f"{' and '.join(known)} write pooled vectors of width {sum(known.values())}: they were "
            f"not made for each other"
        )
    missing = [name for name in _CLIPS if name not in known]
    absent = {name: rest if name == missing[0] else 0 for name in missing}
    return {name: (known | absent)[name] for name in _CLIPS}
