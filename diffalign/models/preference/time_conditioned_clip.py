"""CLIP with a vision tower that knows how noisy its image was: the step-aware preference model.

Every block of the vision tower is modulated by the time (adaLN, as in diffusion transformers); the
text tower is CLIP's own. At the start all modulation is the identity, so that the network scores as
the plain CLIP does at every time. Parameters bear the names of the authors' checkpoints.

Source: Liang et al. 2024, arXiv:2406.04314; RockeyCoss/SPO, step_aware_preference_model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from diffalign.models.preference.clip_loading import cosine, text_features
from diffalign.seeding import cpu_generator

_FREQUENCIES = 128
"""Pairs of cosine and sine in the time embedding."""
_SHIFT_SCALE_GATE = 6
"""Vectors that modulate a block: shift, scale and gate of its attention, then of its MLP."""


def sinusoidal_time(t: Tensor) -> Tensor:
    """Cosines, then sines, of the time at 128 frequencies from 1 down to almost 1 / 10000.

    Args:
        t: timesteps, shape [n]; a half-precision one could not tell 501 from 502.

    Returns:
        Shape [n, 256], float32.
    """
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=t.device) / _FREQUENCIES
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Time as a vector of the tower's width."""

    def __init__(self, width: int, *, seed: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        generator = cpu_generator(seed)
        for name, parameter in self.mlp.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, t: Tensor) -> Tensor:
        """[n] -> [n, width]."""
        embedding: Tensor = self.mlp(sinusoidal_time(t))
        return embedding


def _modulation(width: int, vectors: int, *, gates: tuple[int, ...] = ()) -> nn.Sequential:
    """Time embedding to so many vectors: at first 1 for gates and 0 for all others, at any time."""
    linear = nn.Linear(width, vectors * width)
    nn.init.zeros_(linear.weight)
    bias = torch.zeros(vectors, width)
    bias[list(gates)] = 1.0
    linear.bias.data.copy_(bias.flatten())
    return nn.Sequential(nn.SiLU(), linear)


class TimeConditionedCLIP(nn.Module):
    """Scores of images seen through one denoising step, as a function of that step's time."""

    def __init__(self, clip: CLIPModel, *, seed: int = 0) -> None:
        """Args:
        clip: taken over: its vision tower is given the modulation's modules.
        seed: of the time embedding's initial weights; they do not matter until training.
        """
        super().__init__()
        vision: Any = clip.vision_model
        width = vision.config.hidden_size
        with torch.random.fork_rng(devices=[]):  # layers sample weights that are then replaced
            clip.t_embedder = TimeEmbedding(width, seed=seed)
            for layer in vision.encoder.layers:
                layer.adaLN_modulation = _modulation(width, _SHIFT_SCALE_GATE, gates=(2, 5))
            vision.adaLN_modulation = _modulation(width, 2)
        self.model = clip

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower takes, pixels."""
        vision: Any = self.model.vision_model
        return int(vision.config.image_size)

    @property
    def text_length(self) -> int:
        """Tokens that the text tower takes."""
        text: Any = self.model.text_model
        return int(text.config.max_position_embeddings)

    def forward(self, pixels: Tensor, t: Tensor, tokens: Tensor, text_rows: Tensor) -> Tensor:
        """Scores of images against texts.

        Args:
            pixels: normalised as CLIP's, shape [n, 3, image_size, image_size].
            t: training timesteps, shape [n].
            tokens: of m texts, int64 [m, text_length].
            text_rows: which text belongs to each image, int64 [n].

        Returns:
            exp(logit_scale) times the cosine, shape [n], float32.
        """
        images = self.image_features(pixels, t)
        texts = text_features(self.model, tokens)[text_rows]
        scores: Tensor = self.model.logit_scale.float().exp() * cosine(images, texts)
        return scores

    def image_features(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Projected features of images, not normalised, shape [n, projection]."""
        clip: Any = self.model
        time = clip.t_embedder(t)
        hidden = clip.vision_model.pre_layrnorm(clip.vision_model.embeddings(pixels))
        for layer in clip.vision_model.encoder.layers:
            hidden = _modulated_block(layer, hidden, time)
        pooled = clip.vision_model.post_layernorm(hidden[:, 0])
        shift, scale = clip.vision_model.adaLN_modulation(time).chunk(2, dim=-1)
        features: Tensor = clip.visual_projection(pooled * (1 + scale) + shift)
        return features


def _modulated_block(layer: Any, hidden: Tensor, time: Tensor) -> Tensor:
    """One block of the vision tower, [n, tokens, width] -> the same."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
        vector[:, None] for vector in layer.adaLN_modulation(time).chunk(_SHIFT_SCALE_GATE, dim=-1)
    )
    modulated = layer.layer_norm1(hidden) * (1 + scale_1) + shift_1
    hidden = hidden + gate_1 * layer.self_attn(modulated)[0]
    modulated = layer.layer_norm2(hidden) * (1 + scale_2) + shift_2
    return hidden + gate_2 * layer.mlp(modulated)
