"""Collages, and how much of a map falls on their parts; shares are those of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.synthesis import layouts
from tests.responses import random_image


@pytest.mark.parametrize(("number", "share"), [(0, 0.083333), (1, 0.15), (2, 0.35), (3, 0.416667)])
def test_shares_of_a_grid_are_those_of_the_authors_code(number, share):
    values = torch.arange(16.0).reshape(4, 4)
    assert layouts.cell_share(values, (2, 2), number) == pytest.approx(share, abs=1e-6)


def test_parts_that_do_not_divide_evenly_are_larger_at_the_beginning():
    values = torch.ones(4, 5)
    assert layouts.cell_share(values, (1, 2), 0) == pytest.approx(3 / 5)
    assert layouts.cell_share(values, (3, 1), 0) == pytest.approx(2 / 4)


def test_a_map_with_too_few_entries_is_refused():
    with pytest.raises(ValueError, match="no 2 by 3 parts"):
        layouts.cell_share(torch.ones(2, 2), (2, 3), 0)


def test_the_centre_of_24_by_24_is_16_by_16():
    values = torch.zeros(24, 24)
    values[4:20, 4:20] = 3.0
    assert layouts.centre_share(values) == pytest.approx(1.0)
    assert layouts.centre_share(torch.ones(24, 24)) == pytest.approx((16 / 24) ** 2)


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (2, (936, 488)),
        (3, (1424, 488)),
        (4, (936, 976)),
        (6, (1424, 976)),
        (9, (1424, 1464)),
    ],
)
def test_a_grid_has_the_size_of_its_cells_and_margins(count, size):
    images = [Image.new("RGB", (448, 448), (0, 0, 20 * n)) for n in range(count)]
    collage = layouts.grid(images)
    assert collage.size == size
    rows, columns = layouts.GRIDS[count]
    last = ((columns - 1) * 488 + 447, (rows - 1) * 488 + 40 + 447)
    assert collage.getpixel(last) == (0, 0, 20 * (count - 1))


def test_a_image_of_a_grid_keeps_its_aspect_at_the_top_left_below_its_label():
    collage = layouts.grid([Image.new("RGB", (20, 10), "red"), Image.new("RGB", (9, 9), "blue")])
    assert collage.getpixel((0, 40)) == (255, 0, 0)
    assert collage.getpixel((447, 40 + 223)) == (255, 0, 0)
    assert collage.getpixel((0, 40 + 225)) == (255, 255, 255)
    label = np.asarray(collage)[:40, 20:200]
    assert label.min() == 0 and np.asarray(collage)[:40, :20].min() == 255


def test_a_image_within_a_image_fits_seven_tenths_at_the_centre():
    collage = layouts.image_in_image(
        Image.new("RGB", (100, 50), "white"), Image.new("RGB", (30, 30), "black")
    )
    dark = np.argwhere(np.asarray(collage)[..., 0] < 128)
    assert collage.size == (100, 50)
    assert dark.min(axis=0).tolist() == [7, 32] and dark.max(axis=0).tolist() == [41, 66]


def test_noise_falls_on_one_cell_alone():
    collage = random_image("collage", size=(40, 20))
    noisy = layouts.noisy_cell(collage, (1, 2), 1, sigma=225, seed=3)
    before, after = np.asarray(collage), np.asarray(noisy)
    assert (before[:, :20] == after[:, :20]).all()
    assert (before[:, 20:] != after[:, 20:]).mean() > 0.9
    again = layouts.noisy_cell(collage, (1, 2), 1, sigma=225, seed=3)
    assert (np.asarray(again) == after).all()
