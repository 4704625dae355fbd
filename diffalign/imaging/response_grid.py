"""Images with what models say of them, side by side; wrong parts are red and underlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from diffalign.imaging.grid import (
    INK,
    LINE,
    MUTED,
    PAPER,
    Colour,
    Font,
    first_line,
    fit,
    font_for,
)

WRONG: Colour = (196, 43, 43)
_IMAGE = 128
"""Side of an image; a multiple of the 64 pixels of playground images."""
_RESPONSE = 384
"""Width of a column of responses."""
_TEXT = 20
_NOTE = 17
_LINE = 28
"""Height of a line of text."""
_GAP = 20
_MARGIN = 28


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a response."""

    text: str
    wrong: bool = False


@dataclass(frozen=True, kw_only=True)
class Response:
    """One model's response to one image."""

    passages: Sequence[Passage]
    """In order; a space is put between them."""
    note: str = ""
    """A muted line below, such as what the response misses."""


@dataclass(frozen=True, kw_only=True)
class ResponseRow:
    """One image and what every model says of it."""

    image: Image.Image
    responses: Sequence[Response]


def render_responses(
    rows: Sequence[ResponseRow], columns: Sequence[str], *, title: str = ""
) -> Image.Image:
    """Render images from top to bottom and models from left to right.

    Args:
        rows: at least one, each with a response per column.
        columns: names of the models, at least one.
        title: a line above everything.

    Returns:
        An RGB image; save it as PNG.

    Raises:
        ValueError: there is nothing to render, or a row has another number of responses than there
            are columns.
    """
    if not rows or not columns:
        raise ValueError("an image of responses needs at least one row and one column")
    for i, row in enumerate(rows):
        if len(row.responses) != len(columns):
            raise ValueError(
                f"row {i} has {len(row.responses)} responses for {len(columns)} columns"
            )
    images = [fit(row.image, _IMAGE) for row in rows]
    texts = [[_lines(response) for response in row.responses] for row in rows]
    heights = [
        max(image.height, *(_LINE * len(lines) for lines in of_row))
        for image, of_row in zip(images, texts, strict=True)
    ]
    lefts = [_MARGIN + _IMAGE + _GAP + i * (_RESPONSE + _GAP) for i in range(len(columns))]
    top = _MARGIN + (2 * _LINE if title else 0)
    size = (
        lefts[-1] + _RESPONSE + _MARGIN,
        top + _LINE + sum(heights) + 2 * _GAP * len(rows) + _MARGIN - _GAP,
    )
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((_MARGIN, _MARGIN), title, fill=INK, font=font_for(title, round(1.2 * _TEXT)))
    for left, name in zip(lefts, columns, strict=True):
        pen.text((left, top), name, fill=MUTED, font=font_for(name, _TEXT))
    top += _LINE
    for image, of_row, height in zip(images, texts, heights, strict=True):
        pen.line((_MARGIN, top + _GAP / 2, size[0] - _MARGIN, top + _GAP / 2), fill=LINE, width=2)
        top += _GAP
        canvas.paste(image, (_MARGIN, top))
        for left, lines in zip(lefts, of_row, strict=True):
            for i, line in enumerate(lines):
                _render_line(pen, (left, top + i * _LINE), line)
        top += height + _GAP
    return canvas


@dataclass(frozen=True)
class _Word:
    """A word, or as much of it as fits on a line."""

    text: str
    left: float
    colour: Colour
    font: Font


def _lines(response: Response) -> list[list[_Word]]:
    """Response and note, broken into lines."""
    text = " ".join(passage.text for passage in response.passages)
    said = [(p.text, WRONG if p.wrong else INK) for p in response.passages]
    note = _wrapped([(response.note, MUTED)], font_for(response.note, _NOTE))
    return _wrapped(said, font_for(text, _TEXT)) + note


def _wrapped(texts: Sequence[tuple[str, Colour]], font: Font) -> list[list[_Word]]:
    """Lines of running text whose colour changes."""
    lines: list[list[_Word]] = []
    left = float(_RESPONSE)
    for text, colour in texts:
        for word in text.split():
            rest = word
            while rest:
                piece = first_line(rest, font, _RESPONSE)
                width = font.getlength(piece)
                if left + width > _RESPONSE:
                    lines.append([])
                    left = 0.0
                lines[-1].append(_Word(piece, left, colour, font))
                left += width + font.getlength(" ")
                rest = rest[len(piece) :]
    return lines


def _render_line(pen: ImageDraw.ImageDraw, corner: tuple[int, int], line: Sequence[_Word]) -> None:
    x, y = corner
    for word in line:
        left = x + word.left
        pen.text((left, y), word.text, fill=word.colour, font=word.font)
        if word.colour == WRONG:
            below = y + _TEXT + 4
            pen.line((left, below, left + word.font.getlength(word.text), below), WRONG, width=2)
