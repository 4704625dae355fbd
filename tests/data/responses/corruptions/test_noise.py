import numpy as np
import pytest
from PIL import Image

from diffalign.data.responses.corruptions.noise import Noise
from diffalign.seeding import cpu_generator


def grey(level):
    return Image.new("RGB", (60, 50), (level,) * 3)


def test_sigma_is_in_levels():
    noisy = np.asarray(Noise(sigma=20).image(grey(128), cpu_generator(0)), dtype=float)
    assert noisy.shape == (50, 60, 3)
    assert noisy.mean() == pytest.approx(128, abs=1)
    assert noisy.std() == pytest.approx(20, abs=1)


def test_levels_are_clamped_and_do_not_wrap():
    noisy = np.asarray(Noise(sigma=40).image(grey(0), cpu_generator(0)))
    assert (noisy == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert noisy.max() < 230  # wrapped round, -1 would be 255


def test_a_negative_sigma_is_refused():
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        Noise(sigma=-1)
