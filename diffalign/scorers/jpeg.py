"""How small an image gets as a JPEG file: a scorer that needs no weights and cannot be argued with.

Compressible images are smooth and plain, incompressible ones full of detail. It is the standard
first test of methods that learn from a score, since whether it worked is seen at a glance.

Source: Black et al. 2023, arXiv:2305.13301 (DDPO); rewards.py of kvablack/ddpo-pytorch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.ranges import Between
from diffalign.scorers.images import AbstractImageScorer


@dataclass(frozen=True, kw_only=True)
class JPEG(AbstractImageScorer):
    """Size of the JPEG file, in kilobytes of 1000 bytes; prompts do not matter."""

    goal: Literal["compressible", "incompressible"] = "compressible"
    """`compressible` prefers small files and scores minus the size, `incompressible` large ones."""
    quality: Annotated[int, Between(1, 100)] = 95
    """Of the JPEG encoder, from 1 to 100; 95 in DDPO."""

    @property
    def fingerprint(self) -> str:
        return f"jpeg-{self.goal}-{self.quality}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        sizes = torch.tensor([_file_size(image, self.quality) for image in images])
        return sizes / (1000 if self.goal == "incompressible" else -1000)


def _file_size(image: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
