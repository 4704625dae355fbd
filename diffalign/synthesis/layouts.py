"""Collages of images, the parts of them, and how much of a map falls on a part.

Source: MIA-DPO (Liu et al. 2024, arXiv:2410.17637), gen_data of the authors' code. Departure:
labels are rendered in Pillow's own font instead of Arial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign.data.responses.corruptions.noise import Noise

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Number of images -> rows and columns."""
CELL = 448
"""Pixels of a side of the square that an image of a grid is fitted into."""
MARGIN = 40
"""Pixels between images, and above each for its label."""
INNER = 0.7
"""Share of the width and height of its host that an image within an image fits into."""
_LABEL_LEFT = 20
_LABEL_SIZE = 36
_CENTRE = 16 / 24
"""Share of the side of a map that counts as its centre."""


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest image of the same aspect within some pixels."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Images in rows, each labelled `Image1`, `Image2`, ... in reading order.

    Args:
        images: RGB, as many as a key of `GRIDS`.

    Returns:
        RGB, white where there is no image; each is at the top left of its cell.
    """
    rows, columns = GRIDS[len(images)]
    size = (CELL * columns + MARGIN * (columns - 1), (CELL + MARGIN) * rows)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=_LABEL_SIZE)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = column * (CELL + MARGIN), row * (CELL + MARGIN)
        canvas.paste(fit(image, CELL, CELL), (left, top + MARGIN))
        pen.text((left + _LABEL_LEFT, top), f"Image{number + 1}", "black", font=font)
    return canvas


def image_in_image(host: Image.Image, inner: Image.Image) -> Image.Image:
    """An image at the centre of another one, which keeps its size."""
    fitted = fit(inner, max(1, int(INNER * host.width)), max(1, int(INNER * host.height)))
    canvas = host.copy()
    canvas.paste(fitted, ((host.width - fitted.width) // 2, (host.height - fitted.height) // 2))
    return canvas


def noisy_cell(
    collage: Image.Image, cells: tuple[int, int], number: int, *, sigma: float, seed: int
) -> Image.Image:
    """A collage with noise on one of equal parts, margins included.

    Args:
        collage: RGB.
        cells: rows and columns.
        number: of the part in reading order, from 0.
        sigma: standard deviation in levels of 0 to 255; clamped, not wrapped.
        seed: of the noise.
    """
    row, column = divmod(number, cells[1])
    height, width = collage.height // cells[0], collage.width // cells[1]
    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    result = collage.copy()
    result.paste(noisy(collage.crop(box), sigma=sigma, seed=seed), box[:2])
    return result


def noisy(image: Image.Image, *, sigma: float, seed: int) -> Image.Image:
    """An image with noise on all of it."""
    return Noise(sigma=sigma).image(image, torch.Generator().manual_seed(seed))


def cell_share(values: Tensor, cells: tuple[int, int], number: int) -> float:
    """The share of a map that falls on one of its parts.

    Where the sides do not divide evenly, the first rows and columns are one entry larger.

    Args:
        values: [h, w], not negative.
        cells: rows and columns.
        number: of the part in reading order, from 0.

    Raises:
        ValueError: the map has fewer rows or columns than that.
    """
    if values.shape[0] < cells[0] or values.shape[1] < cells[1]:
        raise ValueError(f"a map of {tuple(values.shape)} has no {cells[0]} by {cells[1]} parts")
    row, column = divmod(number, cells[1])
    part = values.tensor_split(cells[0], dim=0)[row].tensor_split(cells[1], dim=1)[column]
    return float(part.double().sum() / values.double().sum())


def centre_share(values: Tensor) -> float:
    """The share of a map that falls on its centre: 16 by 16 of 24 by 24."""
    height, width = (round(_CENTRE * side) for side in values.shape)
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    part = values[top : top + height, left : left + width]
    return float(part.double().sum() / values.double().sum())
