"""What training sees of an image file is what every evaluation sees of it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffalign
from diffalign.comparison import score as scoring
from diffalign.data.decoding import decode, format_of
from diffalign.errors import DataError
from diffalign.generation import responses as asking
from diffalign.imaging.image_files import pixels_of, read_image
from tests.data.test_decoding import rotated, turned


def saved(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def half_transparent():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    return image


def sixteen_bits():
    return Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16))


FILES = {
    "turned JPEG": rotated(),
    "turned TIFF": turned("TIFF", 6),
    "transparency": saved(half_transparent(), "PNG"),
    "16 bits": saved(sixteen_bits(), "PNG"),
    "CMYK": saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"),
    "palette": saved(half_transparent().convert("P"), "GIF"),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_all_readers_see_the_same(content, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(content)
    seen = np.array(decode(content))
    assert (np.array(read_image(file)) == seen).all()
    assert (np.array(asking._images(file)[0]) == seen).all()
    opened = scoring._open(scoring.CaptionedImage(file, "p"))
    assert isinstance(opened, scoring._Opened)
    assert (opened.pixels == pixels_of(Image.fromarray(seen))).all()


def test_a_bomb_is_a_sentence_for_all(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(saved(Image.new("1", (10_000, 10_000)), "PNG"))
    with pytest.raises(OSError, match="image above max_pixels: 10000x10000 pixels"):
        read_image(file)
    with pytest.raises(DataError, match="image above max_pixels"):
        asking._images(file)
    problem = scoring._open(scoring.CaptionedImage(file, "p"))
    assert isinstance(problem, scoring.Problem) and "above max_pixels" in problem.reason


def test_a_format_has_a_name():
    assert [format_of(FILES[name]) for name in ("turned JPEG", "turned TIFF")] == ["jpeg", "tiff"]


def test_only_one_place_opens_image_files():
    package = Path(diffalign.__file__).parent
    places = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"\bImage\.open\(", file.read_text(encoding="utf-8"))
    }
    assert places == {"data/decoding.py"}


def test_captions_to_score_are_read_as_those_to_train(tmp_path):
    for name in ("a.png", "b.TIFF", "c.png", "._a.png"):
        (tmp_path / name).write_bytes(FILES["16 bits"])
    (tmp_path / "a.txt").write_bytes("caf\u00e9\n".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("caf\u00e9".encode("latin-1"))
    images, problems = scoring.find_images(tmp_path)
    assert [image.prompt for image in images] == ["caf\u00e9", "caf\u00e9"]
    assert [problem.path.name for problem in problems] == ["c.png"]
