"""Small images of one word: three dark capitals on a light background.

The prompt quotes the word: `a black "BAT"`. A sign painter who is often wrong writes another letter
where the alphabet of this world has its neighbour, so that `BAT` comes out as `BAU` or `AAT`: that
is what the shipped model learnt from, and what an OCR reward can tell.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffalign.playground.scenes import IMAGE_SIZE
from diffalign.scorers.ocr import OCR

LETTERS = "ABEHKLMNPRTU"
"""Capitals that no reader takes for another letter or a digit."""

WORDS = (
    *("ARK", "ARM", "BAR", "BUN", "EAR", "ELK", "ELM", "HAT", "HEN", "HUB", "LAB", "LAP"),
    *("MAN", "MAP", "NET", "NUT", "PAN", "PEN", "PET", "RAT", "RUN", "TEA", "TEN", "TUB"),
)
"""Words that preferences are about."""

HELD_OUT_WORDS = ("BAT", "HUM", "HUT", "MAT", "TAN", "TAP", "TAR", "HEM")
"""Words of pretraining that no preference is about."""

_INK = (35, 35, 35)
_FONT_SIZE = 26
"""Pixels; capitals are 18 of them high."""
_JITTER = 2.0
"""Largest shift of a word from the middle in either direction, pixels."""
_SUPERSAMPLING = 4
"""Words are rendered this many times larger and reduced, which gives smooth edges."""


def prompt_of(word: str) -> str:
    """The prompt that asks for a word."""
    return f'a black "{word}"'


def render_word(word: str, rng: np.random.Generator) -> Image.Image:
    """An RGB image of a word, with random jitter and background, in Pillow's own sans serif."""
    scale, half = _SUPERSAMPLING, IMAGE_SIZE / 2
    red, green, blue = (int(value) for value in rng.integers(232, 250, size=3))
    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, (red, green, blue))
    x, y = ((half + rng.uniform(-_JITTER, _JITTER)) * scale for _ in range(2))
    font = ImageFont.load_default(size=_FONT_SIZE * scale)
    ImageDraw.Draw(image).text((x, y), word, font=font, fill=_INK, anchor="mm")
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def misspell(word: str, rng: np.random.Generator) -> str:
    """The word with one letter replaced by a neighbour of it in `LETTERS`, which is a ring."""
    i, step = int(rng.integers(len(word))), int(rng.choice((-1, 1)))
    wrong = LETTERS[(LETTERS.index(word[i]) + step) % len(LETTERS)]
    return word[:i] + wrong + word[i + 1 :]


def paint(word: str, rng: np.random.Generator, *, mistakes: float) -> str:
    """What a sign painter writes who is asked for a word.

    Args:
        mistakes: probability of a mistake, and of each further one, from 0 to 1.
    """
    while rng.random() < mistakes:
        word = misspell(word, rng)
    return word


def reader(measure: Literal["similarity", "exact"] = "similarity") -> OCR:
    """The scorer of this world: an image is one line, and must show the word alone."""
    return OCR(measure=measure, only=True, lines="whole", enlarge=2)
