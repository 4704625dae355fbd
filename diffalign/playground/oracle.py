"""A scorer that cannot be fooled by its own taste: it reads which objects an image shows.

Each pixel that is far from the background votes for the nearest colour of the palette; what stays
connected after a small opening is an object, and the share of its bounding box that it fills tells
its shape. No weights, no randomness: the same image always earns the same score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from diffalign.playground.scenes import COLOURS, PALETTE, SIDES, Kind, parse_caption
from diffalign.scorers.images import AbstractImageScorer

_BACKGROUND_DISTANCE = 60.0
"""A pixel closer than this to the image's median colour is background (RGB, 0 to 255)."""
_COLOUR_DISTANCE = 90.0
"""A pixel farther than this from every palette colour is nothing in particular."""
_MIN_PIXELS = 45
"""Smaller components are dirt; the smallest cross has about 200 pixels."""
_LEFT, _RIGHT = 0.4, 0.6
"""Fractions of the width where the left side ends and the right side begins."""
_PALETTE = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float32)


@dataclass(frozen=True, order=True)
class SeenObject:
    """One object found in an image."""

    kind: Kind
    side: str
    """`left`, `centre` or `right`."""


@dataclass(frozen=True)
class LocatedObject:
    """One object found in an image, with where it lies."""

    kind: Kind
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, pixels."""
    mask: NDArray[np.bool_]
    """Which pixels show it, shape [H, W]."""


def read_objects(image: Image.Image | np.ndarray) -> list[SeenObject]:
    """Read the objects of an image, from left to right.

    Args:
        image: RGB image, or its array of shape [H, W, 3] with values from 0 to 255.
    """
    found: list[tuple[float, SeenObject]] = []
    for each in locate_objects(image):
        x = (each.box[0] + each.box[2]) / 2 / each.mask.shape[1]
        found.append((x, SeenObject(each.kind, _side(x))))
    return [item for _, item in sorted(found)]


def locate_objects(image: Image.Image | np.ndarray) -> list[LocatedObject]:
    """Objects of an image with their places, by colour.

    Args:
        image: RGB image, or its array of shape [H, W, 3] with values from 0 to 255.
    """
    levels = image.convert("RGB") if isinstance(image, Image.Image) else image
    pixels = np.asarray(levels, dtype=np.float32, order="F")  # colour by colour is 3 times as fast
    found = []
    labels = _nearest_colours(pixels)
    for i, colour in enumerate(COLOURS):
        mask = labels == i
        if mask.sum() < _MIN_PIXELS:
            continue
        components, _ = ndimage.label(ndimage.binary_opening(mask))
        for window, component in _windows(components):
            if component.sum() < _MIN_PIXELS:
                continue
            rows, columns = window
            whole = np.zeros(pixels.shape[:2], dtype=bool)
            whole[window] = component
            found.append(
                LocatedObject(
                    kind=Kind(colour, _shape(component)),
                    box=(columns.start, rows.start, columns.stop, rows.stop),
                    mask=whole,
                )
            )
    return found


def _nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """Index of each pixel's palette colour, -1 for background and for colours of no name."""
    background = np.median(pixels, axis=(0, 1))
    squared = np.square(pixels[:, :, None, :] - _PALETTE).sum(axis=-1)  # [H, W, colours]
    nearest = squared.argmin(axis=-1)
    plain = np.square(pixels - background).sum(axis=-1) < _BACKGROUND_DISTANCE**2
    return np.where(plain | (squared.min(axis=-1) > _COLOUR_DISTANCE**2), -1, nearest)


def _windows(components: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Bounding box of each labelled component, and its mask inside that box."""
    boxes = ndimage.find_objects(components)
    return [(box, components[box] == i) for i, box in enumerate(boxes, start=1)]


def _shape(component: np.ndarray) -> str:
    """Shape of a mask that is cropped to its bounding box."""
    fill = component.mean()
    if fill > 0.88:
        return "square"
    if fill > 0.68:
        return "circle"
    rows = component.sum(axis=1)
    centroid = (rows @ np.arange(len(rows))) / rows.sum() / (len(rows) - 1)
    return "triangle" if centroid > 0.56 else "cross"


def _side(x: float) -> str:
    if x < _LEFT:
        return "left"
    return "right" if x > _RIGHT else "centre"


def fidelity(objects: Sequence[SeenObject], prompt: str) -> float:
    """How well the objects of an image match a prompt.

    A requested object that is in its place (alone: centre; two: left and right, in the order of
    the prompt) earns 1, elsewhere 1/2, and each seen object is counted once. The sum is divided by
    the number of objects requested or seen, whichever is larger, so extra objects cost too.

    Returns:
        From 0 (nothing of what was asked for) to 1 (that and nothing else).

    Raises:
        ValueError: the prompt is not a playground caption.
    """
    kinds = parse_caption(prompt)
    requested = [
        SeenObject(kind, side) for kind, side in zip(kinds, SIDES[len(kinds)], strict=True)
    ]
    left_over = list(objects)
    unplaced = []
    credit = 0.0
    for wish in requested:
        if wish in left_over:
            left_over.remove(wish)
            credit += 1.0
        else:
            unplaced.append(wish.kind)
    elsewhere = [item.kind for item in left_over]
    for kind in unplaced:
        if kind in elsewhere:
            elsewhere.remove(kind)
            credit += 0.5
    return credit / max(len(requested), len(objects))


@dataclass(frozen=True, kw_only=True)
class PlaygroundOracle(AbstractImageScorer):
    """Fidelity of playground images to their captions, in [0, 1]."""

    @property
    def fingerprint(self) -> str:
        return "playground-oracle-1"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Fidelity of each image to its prompt, shape [n].

        Raises:
            ValueError: a prompt is not a playground caption.
        """
        return torch.tensor(
            [
                fidelity(read_objects(image), prompt)
                for image, prompt in zip(images, prompts, strict=True)
            ]
        )
