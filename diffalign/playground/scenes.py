"""Small images with exact ground truth: coloured shapes on a light background.

A scene is a row of objects, read from left to right; its caption names them in the same order, so
`a red circle and a blue square` asks for the circle on the left. Everything is a function of a
seed: no image is stored, and a preference between two images needs no human and no model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Width and height of every image, pixels."""

PALETTE = MappingProxyType(
    {
        "red": (220, 40, 40),
        "yellow": (245, 200, 30),
        "green": (40, 165, 70),
        "blue": (45, 85, 225),
        "purple": (160, 60, 190),
        "black": (35, 35, 35),
    }
)
"""Colour name -> RGB, 0 to 255; far enough apart to survive an autoencoder."""

COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")

SIDES = MappingProxyType(
    {
        1: {"centre": 0.5},
        2: {"left": 0.27, "right": 0.73},
        3: {"left": 0.18, "centre": 0.5, "right": 0.82},
    }
)
"""Number of objects -> name and horizontal centre of each place, as a fraction of the width.
Three places are defined for larger worlds; `MAX_OBJECTS` says how many this one uses."""

MAX_OBJECTS = 2

_RADIUS = {1: (10.5, 12.5), 2: (10.5, 12.5), 3: (7.5, 8.5)}
"""Number of objects -> smallest and largest half-width, pixels."""
_JITTER = {1: 2.5, 2: 2.5, 3: 1.2}
"""Number of objects -> largest shift of an object from its place in either direction, pixels."""
_SUPERSAMPLING = 4
"""Images are rendered this many times larger and reduced, which gives smooth edges."""
_OBJECT_PATTERN = re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@dataclass(frozen=True, order=True)
class Kind:
    """Words of a caption for one object: its colour and its shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


KINDS = tuple(Kind(colour, shape) for colour, shape in itertools.product(COLOURS, SHAPES))
"""All 24 combinations of colour and shape."""

HELD_OUT = tuple(Kind(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
"""Six combinations that no preference pair shows: each colour once, each shape once or twice.
The pretrained model has seen them, its alignment has not."""


@dataclass(frozen=True)
class Object:
    """One rendered shape."""

    kind: Kind
    x: float
    """Horizontal centre, pixels from the left edge."""
    y: float
    """Vertical centre, pixels from the top edge."""
    radius: float
    """Half of the width, pixels."""


@dataclass(frozen=True)
class Scene:
    """Objects from left to right on a plain background."""

    objects: tuple[Object, ...]
    background: tuple[int, int, int]
    """RGB, 0 to 255."""


def place(kinds: Sequence[Kind], rng: np.random.Generator) -> Scene:
    """A scene that shows `kinds` from left to right, with random size, jitter and background.

    Raises:
        ValueError: there is no row of places for that many objects.
    """
    if len(kinds) not in SIDES:
        raise ValueError(f"a scene holds {min(SIDES)} to {max(SIDES)} objects, got {len(kinds)}")
    objects, jitter = [], _JITTER[len(kinds)]
    for kind, column in zip(kinds, SIDES[len(kinds)].values(), strict=True):
        dx, dy = rng.uniform(-jitter, jitter, size=2).tolist()
        radius = rng.uniform(*_RADIUS[len(kinds)])
        objects.append(Object(kind, column * IMAGE_SIZE + dx, IMAGE_SIZE / 2 + dy, radius))
    red, green, blue = (int(value) for value in rng.integers(232, 250, size=3))
    return Scene(tuple(objects), (red, green, blue))


def sample_kinds(rng: np.random.Generator, *, single_share: float = 0.25) -> tuple[Kind, ...]:
    """One combination with probability `single_share`, else two different ones."""
    count = 1 if rng.random() < single_share else MAX_OBJECTS
    return tuple(KINDS[i] for i in rng.choice(len(KINDS), size=count, replace=False))


def sample_scene(seed: int | np.random.Generator) -> Scene:
    """The scene that belongs to a seed, or the next one of a generator."""
    rng = np.random.default_rng(seed)
    return place(sample_kinds(rng), rng)


def render(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, `IMAGE_SIZE` on both sides."""
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), scene.background)
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _render(pen, item.kind, item.x * scale, item.y * scale, item.radius * scale)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _render(pen: ImageDraw.ImageDraw, kind: Kind, x: float, y: float, radius: float) -> None:
    colour = PALETTE[kind.colour]
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if kind.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif kind.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif kind.shape == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        arm = radius / 3
        pen.rectangle((left, y - arm, right, y + arm), fill=colour)
        pen.rectangle((x - arm, top, x + arm, bottom), fill=colour)


def caption(scene: Scene) -> str:
    """The caption of a truthful annotator: the objects from left to right."""
    return describe(item.kind for item in scene.objects)


def describe(kinds: Iterable[Kind]) -> str:
    """The caption that asks for these objects, from left to right."""
    return " and ".join(map(str, kinds))


def parse_caption(text: str) -> tuple[Kind, ...]:
    """The objects that a caption asks for, from left to right.

    Raises:
        ValueError: the text is not `a COLOUR SHAPE`, once or joined by `and`.
    """
    matches = [_OBJECT_PATTERN.fullmatch(part.strip()) for part in text.lower().split(" and ")]
    kinds = tuple(Kind(match[1], match[2]) for match in matches if match)
    if len(kinds) != len(matches) or len(kinds) not in SIDES:
        raise ValueError(
            f"{text!r} is not a playground caption: write 'a COLOUR SHAPE', once or joined by "
            f"' and ' (colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)})"
        )
    return kinds


def held_out_prompts() -> list[str]:
    """The 36 prompts made of `HELD_OUT` combinations only: 6 singles, 30 ordered pairs."""
    return _prompts(HELD_OUT)


def preference_prompts() -> list[str]:
    """The 324 prompts made of the other combinations: 18 singles, 306 ordered pairs."""
    return _prompts([kind for kind in KINDS if kind not in HELD_OUT])


def _prompts(kinds: Sequence[Kind]) -> list[str]:
    rows = [
        row for count in range(1, MAX_OBJECTS + 1) for row in itertools.permutations(kinds, count)
    ]
    return [describe(row) for row in rows]
