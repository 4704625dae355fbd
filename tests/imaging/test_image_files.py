from __future__ import annotations

from PIL import Image

from diffalign.imaging.image_files import read_image


def test_an_image_of_any_mode_is_read_as_rgb(tmp_path):
    Image.new("L", (2, 1), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").getpixel((1, 0)) == (7, 7, 7)
