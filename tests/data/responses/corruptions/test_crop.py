import math

import numpy as np
import pytest
from PIL import Image

from diffalign.data.responses.corruptions.crop import Crop
from diffalign.seeding import cpu_generator


def boxes(width, height, count=400, **settings):
    crop = Crop(**settings)
    return np.array([crop.box(width, height, cpu_generator(seed)) for seed in range(count)])


def test_the_kept_area_is_uniform_between_its_bounds():
    left, top, right, bottom = boxes(1000, 800).T
    share = (right - left) * (bottom - top) / (1000 * 800)
    assert 0.0095 < share.min() < 0.02 and 0.19 < share.max() < 0.2005
    assert share.mean() == pytest.approx(0.105, abs=0.01)


def test_the_aspect_is_log_uniform_from_three_quarters_to_four_thirds():
    left, top, right, bottom = boxes(1000, 800).T
    logarithm = np.log((right - left) / (bottom - top)) / math.log(4 / 3)
    assert abs(logarithm).max() < 1.02
    assert logarithm.mean() == pytest.approx(0.0, abs=0.1)
    assert logarithm.var() == pytest.approx(1 / 3, abs=0.05)


def test_a_crop_lies_in_the_image_and_reaches_every_border():
    left, top, right, bottom = boxes(100, 80, smallest=0.15).T
    assert left.min() == 0 and top.min() == 0
    assert right.max() == 100 and bottom.max() == 80


def test_a_crop_keeps_the_size_of_the_image_and_shows_a_part_of_it():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (150, 1))
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    left, _, right, _ = Crop().box(200, 150, cpu_generator(1))
    cropped = Crop().image(image, cpu_generator(1))
    assert cropped.size == image.size
    levels = np.asarray(cropped)[75, :, 0]
    assert left - 1 <= levels.min() and levels.max() <= right
    assert levels.min() == pytest.approx(left, abs=1) and levels.max() == pytest.approx(
        right, abs=2
    )


def test_a_image_too_narrow_for_any_crop_keeps_its_middle():
    assert Crop(smallest=0.9, largest=1.0).box(400, 30, cpu_generator(0)) == (180, 0, 220, 30)
    assert Crop(smallest=0.9, largest=1.0).box(30, 400, cpu_generator(0)) == (0, 180, 30, 220)
    assert Crop().box(1, 1, cpu_generator(0)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "settings", [{"smallest": 0.0}, {"smallest": 0.3}, {"largest": 1.1}, {"stretch": 0.5}]
)
def test_bounds_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be at least 1|0 < smallest <= largest <= 1"):
        Crop(**settings)
