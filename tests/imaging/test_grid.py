from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.imaging import grid
from diffalign.imaging.grid import (
    GridCell,
    GridRow,
    evenly_spaced,
    evenly_spaced_with_ends,
    fit,
    render_grid,
)

PAGE_WIDTH = 830
"""Width, in pixels, at which a code host shows an image of a README."""


def rows_of(columns: int, *, size=(64, 64), count: int = 2, **cell) -> list[GridRow]:
    cells = [GridCell(image=Image.new("RGB", size, (200, 0, 0)), **cell)] * columns
    return [GridRow(caption="a red circle and a blue square", cells=cells)] * count


def red_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the first row's and column's plain red."""
    red = (np.asarray(image) == (200, 0, 0)).all(axis=2)
    top, left = np.argwhere(red)[0]
    right = left + np.argmin(red[top, left:])
    bottom = top + np.argmin(red[top:, left])
    return int(left), int(top), int(right), int(bottom)


@pytest.mark.parametrize("columns", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("size", [(64, 64), (1024, 1024)])
def test_a_cell_is_at_least_192_pixels_at_any_number_of_columns(columns, size):
    image = render_grid(rows_of(columns, size=size), ["model"] * columns)
    left, top, right, bottom = red_box(image)
    assert right - left + 2 >= 192  # the frame's pixel on either side
    assert bottom - top + 2 >= 192


@pytest.mark.parametrize("columns", [2, 3, 4, 5, 6])
def test_captions_are_readable_where_a_page_shows_the_whole_grid(columns, monkeypatch):
    sizes = []
    real = grid.font_for
    monkeypatch.setattr(grid, "font_for", lambda text, size: sizes.append(size) or real(text, size))
    image = render_grid(rows_of(columns), ["model"] * columns)
    caption = max(sizes)
    assert caption * PAGE_WIDTH / image.width >= 11


def test_small_images_are_enlarged_without_new_colours():
    checks = Image.new("RGB", (64, 64), (0, 0, 255))
    checks.paste((255, 255, 0), (0, 0, 32, 64))
    large = fit(checks, 256)
    assert large.size == (256, 256)
    assert {colour for _, colour in large.getcolors()} == {(0, 0, 255), (255, 255, 0)}


def test_proportions_are_kept_and_landscape_rows_are_low():
    assert fit(Image.new("RGB", (1024, 512)), 256).size == (256, 128)
    square = render_grid(rows_of(2, size=(512, 512)), ["a", "b"])
    landscape = render_grid(rows_of(2, size=(512, 256)), ["a", "b"])
    assert landscape.height < 0.7 * square.height


def test_scores_and_titles_make_room_for_themselves():
    plain = render_grid(rows_of(2), ["a", "b"])
    scored = render_grid(rows_of(2, score=0.5), ["a", "b"])
    titled = render_grid(rows_of(2), ["a", "b"], title="Same prompt, same noise")
    assert scored.height > plain.height
    assert titled.height > plain.height


def test_a_winner_is_outlined():
    def greens(winner: bool) -> int:
        image = render_grid(rows_of(2, winner=winner), ["a", "b"])
        return sum(n for n, colour in image.getcolors(10**6) if colour == grid.WINNER)

    assert greens(True) > 4 * 4 * 300
    assert greens(False) == 0


def test_a_missing_image_leaves_its_place_empty():
    row = GridRow(caption="x", cells=[None, *rows_of(1)[0].cells])
    image = render_grid([row], ["a", "b"])
    left, _, _, _ = red_box(image)
    assert left > red_box(render_grid(rows_of(2), ["a", "b"]))[0] + 320


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [([], ["a"], "at least one"), (rows_of(3), ["a", "b"], "row 0 has 3 cells for 2 columns")],
)
def test_what_cannot_be_rendered_is_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        render_grid(rows, columns)


LONG = "an astronaut riding a horse through tall sunflowers, " * 20


@pytest.mark.parametrize(
    "text",
    ["short", LONG, "x" * 900, "stabilityai/stable-diffusion-xl-base-1.0", "一只红色的猫" * 9],
)
def test_a_wrapped_text_fits_and_says_when_it_is_cut(text):
    font = grid.font_for(text, 20)
    lines = grid._wrap(text, font, 200, lines=4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= 200 for line in lines)
    complete = "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert complete != lines[-1].endswith("\N{HORIZONTAL ELLIPSIS}")


def test_a_line_ends_between_words():
    font = grid.font_for("", 20)
    lines = grid._wrap("a red circle and a blue square", font, 150, lines=4)
    assert " ".join(lines) == "a red circle and a blue square"
    assert len(lines) > 1


def test_a_very_long_caption_does_not_leave_its_row():
    one, many = (
        render_grid([GridRow(caption=c, cells=rows_of(2)[0].cells)], ["a", "b"])
        for c in ("x", LONG)
    )
    assert one.size == many.size


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "a"), (2, "ae"), (3, "acf"), (9, "abcdefgh")],
)
def test_each_item_is_for_a_part_of_the_list(count, expected):
    assert "".join(evenly_spaced("abcdefgh", count)) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(2, "ah"), (3, "aeh"), (4, "acfh"), (9, "abcdefgh")]
)
def test_the_first_and_the_last_are_there(count, expected):
    assert "".join(evenly_spaced_with_ends("abcdefgh", count)) == expected


def test_of_nothing_there_is_nothing_to_show():
    assert evenly_spaced([], 4) == evenly_spaced_with_ends([], 4) == []
