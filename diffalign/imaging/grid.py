"""A grid of images: prompts down, models across the top, a score under each.

The rendering scales with its number of columns, so that captions stay readable when a page shows
the whole grid at the width of a column of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]
T = TypeVar("T")

PAPER: Colour = (252, 252, 250)
INK: Colour = (28, 30, 34)
MUTED: Colour = (112, 116, 124)
LINE: Colour = (226, 227, 224)
WINNER: Colour = (22, 128, 92)

_CELL_PIXELS = {1: 384, 2: 320, 3: 320, 4: 256, 5: 256}
"""Number of columns -> side of a cell; every side is a multiple of 64, so that playground images
are enlarged by a whole factor."""
_SMALLEST_CELL = 192
_PIXEL_ART = 128
"""Images up to this many pixels wide are enlarged without smoothing, so that each of their
pixels is seen as it is; larger ones are resampled."""
_CAPTION_LINES = 6
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
)
"""Fonts tried, in this order, for texts beyond Latin, which Pillow's own font does not hold."""


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One image with its caption and score."""

    image: Image.Image
    """Any size and mode; shown whole, its proportions kept."""
    score: float | None = None
    """Written under the image."""
    winner: bool = False
    """Rendered with an outline."""


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """The images of every column for one prompt."""

    caption: str
    """The prompt; long ones are wrapped, then end in an ellipsis."""
    cells: Sequence[GridCell | None]
    """One per column; None is rendered as a missing image."""
    note: str = ""
    """A muted line under the caption, such as the seed."""


def render_grid(
    rows: Sequence[GridRow], columns: Sequence[str], *, title: str = "", cell: int | None = None
) -> Image.Image:
    """Render a captioned, labelled grid.

    Args:
        rows: from top to bottom, at least one.
        columns: their titles from left to right, at least one.
        title: a line above everything.
        cell: side of an image's square in pixels; None chooses by the number of columns.

    Returns:
        An RGB image; save it as PNG.

    Raises:
        ValueError: there is nothing to render, or a row has another number of cells than there are
            columns.
    """
    if not rows or not columns:
        raise ValueError("a grid needs at least one row and one column")
    for i, row in enumerate(rows):
        if len(row.cells) != len(columns):
            raise ValueError(
                f"row {i} has {len(row.cells)} cells for {len(columns)} columns; "
                "give None where an image is missing"
            )
    layout = _Layout.of(rows, columns, title, cell)
    canvas = Image.new("RGB", layout.size, PAPER)
    pen = ImageDraw.Draw(canvas)
    _render_header(pen, layout, columns, title)
    for i, row in enumerate(rows):
        _render_row(canvas, pen, layout, row, i)
    return canvas


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything goes, pixels."""

    cell: int
    """Width of a cell."""
    cell_height: int
    """Of the tallest image: landscape images leave no empty bands."""
    row_count: int
    column_count: int
    text: int
    """Height of the captions' font."""
    header: int
    """Height of everything above the first row, margin included."""
    score: int
    """Height of the line under each image; 0 without scores."""

    @classmethod
    def of(
        cls, rows: Sequence[GridRow], columns: Sequence[str], title: str, cell: int | None
    ) -> _Layout:
        side = cell or _CELL_PIXELS.get(len(columns), _SMALLEST_CELL)
        width = side * (len(columns) + 1)
        text = max(17, round(width / 62))
        titles = [_wrap(name, font_for(name, text), side, lines=2) for name in columns]
        header = round(text * (1.9 + 1.3 * max(map(len, titles))))
        given = [cell for row in rows for cell in row.cells if cell]
        scored = any(cell.score is not None for cell in given)
        return cls(
            cell=side,
            cell_height=max((_fitted_size(c.image, side)[1] for c in given), default=side),
            row_count=len(rows),
            column_count=len(columns),
            text=text,
            header=header + (round(text * 2.6) if title else 0),
            score=round(text * 1.75) if scored else 0,
        )

    @property
    def margin(self) -> int:
        return round(self.text * 1.6)

    @property
    def gap(self) -> int:
        return max(14, round(self.text * 0.8))

    @property
    def gutter(self) -> int:
        """Width of the captions' column."""
        return max(self.cell, 11 * self.text)

    @property
    def row_height(self) -> int:
        return self.cell_height + self.score + self.gap

    def left(self, column: int) -> int:
        return self.margin + self.gutter + self.gap + column * (self.cell + self.gap)

    def top(self, row: int) -> int:
        return self.header + row * self.row_height

    @property
    def size(self) -> tuple[int, int]:
        right = self.left(self.column_count) - self.gap + self.margin
        return right, self.top(self.row_count) - self.gap + self.margin


def _render_header(
    pen: ImageDraw.ImageDraw, layout: _Layout, columns: Sequence[str], title: str
) -> None:
    text = layout.text
    if title:
        size = round(text * 1.4)
        line = _wrap(title, font_for(title, size), layout.size[0] - 2 * layout.margin, lines=1)[0]
        place = (layout.margin, layout.margin)
        pen.text(place, line, fill=INK, font=font_for(title, size), anchor="lt")
    bottom = layout.header - round(text * 0.6)
    for i, name in enumerate(columns):
        font = font_for(name, text)
        lines = _wrap(name, font, layout.cell, lines=2)
        middle = layout.left(i) + layout.cell / 2
        for j, line in enumerate(lines):
            y = bottom - (len(lines) - j - 1) * round(text * 1.3)
            pen.text((middle, y), line, fill=INK, font=font, anchor="ms")


def _render_row(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, layout: _Layout, row: GridRow, index: int
) -> None:
    top = layout.top(index)
    _render_caption(pen, layout, row, top)
    for i, cell in enumerate(row.cells):
        left = layout.left(i)
        box = (left, top, left + layout.cell - 1, top + layout.cell_height - 1)
        if cell is None:
            _render_missing(pen, layout, box)
        else:
            _render_cell(canvas, pen, layout, cell, box)


def _render_caption(pen: ImageDraw.ImageDraw, layout: _Layout, row: GridRow, top: int) -> None:
    """Caption and note, centred next to the images."""
    font, small = font_for(row.caption, layout.text), font_for(row.note, round(layout.text * 0.82))
    height = round(layout.text * 1.34)
    width = layout.gutter - layout.gap
    room = max(1, min(_CAPTION_LINES, layout.cell_height // height - (1 if row.note else 0)))
    lines = _wrap(row.caption, font, width, lines=room)
    y = top + (layout.cell_height - (len(lines) + bool(row.note)) * height) / 2
    for line in lines:
        pen.text((layout.margin, y), line, fill=INK, font=font, anchor="la")
        y += height
    if row.note:
        note = _wrap(row.note, small, width, lines=1)[0]
        pen.text((layout.margin, y + height * 0.12), note, fill=MUTED, font=small, anchor="la")


def _render_missing(
    pen: ImageDraw.ImageDraw, layout: _Layout, box: tuple[int, int, int, int]
) -> None:
    pen.rectangle(box, outline=LINE, width=2)
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    size = round(layout.text * 0.82)
    pen.text(middle, "no image", fill=MUTED, font=font_for("", size), anchor="mm")


def _render_cell(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    layout: _Layout,
    cell: GridCell,
    box: tuple[int, int, int, int],
) -> None:
    image = fit(cell.image, layout.cell)
    left = box[0] + (layout.cell - image.width) // 2
    top = box[1] + (layout.cell_height - image.height) // 2
    canvas.paste(image, (left, top))
    frame = (left, top, left + image.width - 1, top + image.height - 1)
    if cell.winner:
        width = max(3, layout.cell // 64)
        grown = (frame[0] - width, frame[1] - width, frame[2] + width, frame[3] + width)
        pen.rectangle(grown, outline=WINNER, width=width)
    else:
        pen.rectangle(frame, outline=LINE, width=1)
    if cell.score is not None:
        font = font_for("", round(layout.text * 0.86))
        place = ((box[0] + box[2]) / 2, box[3] + round(layout.text * 0.45))
        colour = WINNER if cell.winner else MUTED
        pen.text(place, f"{cell.score:.4g}", fill=colour, font=font, anchor="ma")


def fit(image: Image.Image, side: int) -> Image.Image:
    """The whole image as RGB, its longer side exactly `side` pixels."""
    pixel_art = max(image.size) <= min(_PIXEL_ART, side)
    method = Image.Resampling.NEAREST if pixel_art else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(_fitted_size(image, side), method)


def _fitted_size(image: Image.Image, side: int) -> tuple[int, int]:
    scale = side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


@lru_cache(maxsize=64)
def _scalable(name: str, size: int) -> Font:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def font_for(text: str, size: int) -> Font:
    """Pillow's own font, or one of the system's that reaches beyond Latin."""
    if any(ord(letter) > 0x24F and letter != _ELLIPSIS for letter in text):
        for name in _WIDE_FONTS:
            try:
                return _scalable(name, size)
            except OSError:
                continue
    return _scalable("", size)


def _wrap(text: str, font: Font, width: int, *, lines: int) -> list[str]:
    """Break a text into at most `lines` lines of `width` pixels; what is cut off shows as an
    ellipsis. Words wider than a line are broken."""
    wrapped: list[str] = []
    rest = " ".join(text.split())
    while rest:
        if len(wrapped) == lines:
            last = wrapped[-1]
            while last and font.getlength(last + _ELLIPSIS) > width:
                last = last[:-1].rstrip()
            wrapped[-1] = last + _ELLIPSIS
            break
        line = first_line(rest, font, width)
        wrapped.append(line)
        rest = rest[len(line) :].lstrip()
    return wrapped or [""]


def first_line(text: str, font: Font, width: int) -> str:
    """The longest start of a text that fits, cut after a space, slash, hyphen or underscore where
    there is one."""
    if font.getlength(text) <= width:
        return text
    low, high = 1, len(text)  # text[:low] fits or is one letter, text[:high] does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle)
    if text[low] == " ":
        return text[:low]
    stop = max(text.rfind(mark, 0, low) for mark in " /-_") + 1
    return text[: stop or low].rstrip()


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, spread over all of them, the first included."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def evenly_spaced_with_ends(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, at least 2, from the first one to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
