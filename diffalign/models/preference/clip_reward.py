"""A CLIP as a reward model of images: its towers train, a head on its features does, or both.

With `towers: all` and `head: {kind: cosine}` it is what PickScore is, and its encoder is an
ordinary CLIP that the scorer `pickscore` reads as well.

Source: Kirstain et al. 2023, arXiv:2305.01569 (PickScore).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.config import MAY_CHANGE
from diffalign.models.base import ReferenceKind
from diffalign.models.preference.clip_loading import (
    WEIGHTS,
    digest_of_weights,
    image_features,
    read_clip,
    read_config,
    read_tokenizer,
    text_features,
    tokenize,
    tower_input,
)
from diffalign.models.preference.heads.base import Features
from diffalign.models.preference.rewards import (
    AbstractEncoder,
    AbstractRewardModel,
    RewardModel,
)
from diffalign.models.sharding import Sharder


class CLIPEncoder(AbstractEncoder):
    """A CLIP, whose joint features are those of image and text and their product."""

    has_plain = True

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.width = 3 * clip.config.projection_dim

    def forward(self, **inputs: Tensor) -> Features:
        """Args:
        inputs: `pixels` [n, 3, size, size]; `tokens` of m texts; `text_rows` [n], which of them is
            that of each image.
        """
        images = normalize(image_features(self.clip, inputs["pixels"]).float(), dim=-1)
        texts = normalize(text_features(self.clip, inputs["tokens"]).float(), dim=-1)
        texts = texts[inputs["text_rows"]]
        scale = images.shape[1] ** 0.5  # so that entries are about 1
        joint = [scale * images, scale * texts, scale * scale * images * texts]
        plain = self.clip.logit_scale.float().exp() * (images * texts).sum(dim=-1)
        return Features(joint=torch.cat(joint, dim=1), plain=plain)


@dataclass(frozen=True, kw_only=True)
class CLIPReward(AbstractRewardModel):
    """A reward model of images on CLIP's features."""

    path: str = field(metadata=MAY_CHANGE)
    """The CLIP to start from: a folder or hub id, such as `yuvalkirstain/PickScore_v1`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it does not lie next to the CLIP."""
    towers: Literal["frozen", "vision", "all"] = "frozen"
    """What trains besides the head: nothing, the vision tower, or both towers."""

    def describe(self) -> str:
        towers = {"frozen": "", "vision": "the vision tower and ", "all": "both towers and "}
        return f"reward model on {self.path}, training {towers[self.towers]}{self.head.describe()}"

    def check(self) -> None:
        read_config(self.path, revision=self.revision, field="path")
        self._read_tokenizer()

    def tokenizers(self) -> list[Any]:
        return [self._read_tokenizer()]

    def reopened(self, folder: Path) -> CLIPReward:
        return replace(self, path=str(folder), revision=None, tokenizer=None)

    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> RewardModel:
        clip = read_clip(self.path, revision=self.revision, field="path")
        start = digest_of_weights(clip)
        clip.requires_grad_(self.towers == "all")
        if self.towers == "vision":
            clip.vision_model.requires_grad_(True)
            clip.visual_projection.requires_grad_(True)
        tokenizer = self._read_tokenizer()
        vision: Any = clip.config.vision_config
        text: Any = clip.config.text_config

        def read(images: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
            distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
            length = text.max_position_embeddings
            return {
                "pixels": torch.stack([tower_input(i, vision.image_size) for i in images]),
                "tokens": tokenize(tokenizer, list(distinct), length=length),
                "text_rows": torch.tensor([distinct[prompt] for prompt in prompts]),
            }

        def write(folder: Path, values: Mapping[str, Tensor]) -> None:
            folder.mkdir()
            tensors = {
                name.removeprefix("clip."): value.detach().float().cpu().contiguous()
                for name, value in values.items()
            }
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            clip.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return self.assembled(
            CLIPEncoder(clip),
            read=read,
            write_encoder=None if self.towers == "frozen" else write,
            start=f"{start} {self.towers}",
            rates={},
            device=device,
            compute_dtype=compute_dtype,
            reference=reference,
            trainable=trainable,
        )

    def _read_tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer, field="tokenizer")
        return read_tokenizer(self.path, revision=self.revision, field="path")
