"""Sets of pairs without a defect, and defects to plant in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.layouts import write_rows

MODELS = ("sdxl", "flux")


def noise_image(seed: int, *, pixels: int = 32) -> Image.Image:
    """Coarse noise: no two seeds look alike, whatever the size."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((pixels, pixels), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """As a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """As a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def clean_rows(count: int, *, first: int = 0, pixels: int = 32) -> list[dict[str, Any]]:
    """Rows with Pick-a-Pic's columns: every second one is won by the first image, and by either
    model."""
    rows = []
    for number in range(first, first + count):
        second_won = number % 2 == 1
        rows.append(
            {
                "caption": f"prompt number {number}",
                "jpg_0": jpeg(noise_image(2 * number, pixels=pixels)),
                "jpg_1": jpeg(noise_image(2 * number + 1, pixels=pixels)),
                "label_0": float(not second_won),
                "label_1": float(second_won),
                "model_0": MODELS[number // 2 % 2],
                "model_1": MODELS[1 - number // 2 % 2],
                "nsfw": False,
            }
        )
    return rows


def write(folder: Path, rows: list[dict[str, Any]], *, split: str = "train") -> Path:
    """As parquet with row groups of 16, its split in its name."""
    write_rows(folder / f"{split}-00000-of-00001.parquet", rows, row_group_size=16)
    return folder
