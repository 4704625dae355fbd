"""The network of HPS v3: a Qwen2-VL, and a head on the hidden state of a token of its own.

The token stands at the end of the question. Of it the head makes two numbers: the mean of the score
and the logarithm of its standard deviation. Tokens of images have running positions like words: the
authors hand embeddings to the language model, which then cannot know Qwen2-VL's positions in two
dimensions, and trained so.

Source: Ma et al. 2025, arXiv:2508.03789; MizzenAI/HPSv3, hpsv3/model/qwen2vl_trainer.py and
hpsv3/train.py, of which only one of the heads is in the released weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2VLModel

from diffalign.models.preference.clip_loading import refuse_misfits, renamed

HEAD_WIDTHS = (1024, 16, 2)
"""Outputs of the head's layers."""
_DROPPED = 0.05
_UNUSED = re.compile(r"lm_head\.weight")
"""Weights that the checkpoint has from Qwen2-VL, and no score depends on."""
_RENAMED = [
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
]
"""The names of the checkpoint, which are those of transformers before 4.52, and today's."""


class HPSv3Reward(nn.Module):
    """Mean and logarithm of the standard deviation of scores."""

    def __init__(self, model: Qwen2VLModel, token: int) -> None:
        """Args:
        model: with a row of the vocabulary for the token.
        token: whose hidden state is scored.
        """
        super().__init__()
        self.model = model
        self.token = token
        width = int(model.config.get_text_config().hidden_size)
        first, second, last = HEAD_WIDTHS
        self.rm_head = nn.Sequential(
            nn.Linear(width, first),
            nn.ReLU(),
            nn.Dropout(_DROPPED),  # counts in the names
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, last),
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Mean and logarithm of the standard deviation.

        Args:
            inputs: what the processor gave for n right-padded rows, `input_ids` and
                `attention_mask` among them; each row has the token once.

        Returns:
            Shape [n, 2], float32.
        """
        known = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        taken: dict[str, Any] = {name: inputs[name] for name in known}
        taken["pixel_values"] = taken["pixel_values"].to(self.model.dtype)
        running = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
        hidden = self.model(
            **taken, position_ids=running.expand(3, -1, -1), use_cache=False
        ).last_hidden_state
        found: Tensor = self.rm_head(hidden[inputs["input_ids"] == self.token].float())
        return found


def filled_hpsv3(
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    *,
    vocabulary: int,
    token: int,
    dtype: torch.dtype,
    source: str,
) -> HPSv3Reward:
    """A network on the CPU with the weights of a checkpoint; its head is in float32.

    Args:
        config: of the Qwen2-VL that it was made of.
        state: the weights by the names of the checkpoint.
        vocabulary: tokens of its tokenizer and the one more.
        token: the one more.
        dtype: in which the Qwen2-VL is kept.
        source: where the weights come from, for errors.

    Raises:
        ModelError: weights are missing, superfluous or of another shape.
    """
    own = copy.deepcopy(config)
    own.get_text_config().vocab_size = vocabulary
    with torch.device("meta"):
        network = HPSv3Reward(Qwen2VLModel(own), token)  # type: ignore[arg-type]
    given = refuse_misfits(network, renamed(state, _RENAMED, unused=_UNUSED), source=source)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "rm_head": {}}
    for name, value in given.items():
        part, _, inside = name.partition(".")
        parts[part][inside] = value
    network.model = Qwen2VLModel.from_pretrained(
        None, config=own, state_dict=parts["model"], dtype=dtype
    )
    network.rm_head.to_empty(device="cpu").float()
    network.rm_head.load_state_dict(parts["rm_head"])
    return network.requires_grad_(False).eval()
