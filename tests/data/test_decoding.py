import io
import zlib

import numpy as np
import pytest
from PIL import Image

from diffalign.data.decoding import BadImageError, decode, upright_size
from diffalign.data.records import SkipReason
from tests.layouts import encoded, picture

LIMIT = 10_000


def reason(content, max_pixels=LIMIT):
    with pytest.raises(BadImageError) as error:
        decode(content, max_pixels=max_pixels)
    return error.value.reason


def test_no_image():
    assert reason(None) is SkipReason.MISSING_IMAGE


def test_a_path_that_does_not_exist(tmp_path):
    assert reason(tmp_path / "gone.png") is SkipReason.MISSING_IMAGE


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert reason(tmp_path / "empty.png") is SkipReason.EMPTY_FILE
    assert reason(b"") is SkipReason.EMPTY_FILE


def test_a_file_of_another_kind():
    with pytest.raises(BadImageError, match="3c 68 74 6d 6c 3e") as error:
        decode(b"<html>not found</html>", max_pixels=LIMIT)
    assert error.value.reason is SkipReason.CORRUPT


def noise():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file(kind):
    content = encoded(noise(), kind)
    assert reason(content[: len(content) // 2]) in (SkipReason.TRUNCATED, SkipReason.CORRUPT)


def test_a_truncated_jpeg_is_called_truncated():
    content = encoded(noise(), "JPEG")
    assert reason(content[: len(content) * 3 // 4]) is SkipReason.TRUNCATED


def test_damage_in_the_middle_of_a_png():
    content = bytearray(encoded(noise()))
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    assert reason(bytes(content)) in (SkipReason.CORRUPT, SkipReason.TRUNCATED)


def test_an_image_above_max_pixels_is_refused_by_its_header():
    content = encoded(Image.new("1", (400, 400)))
    assert reason(content, max_pixels=400 * 400 - 1) is SkipReason.TOO_LARGE
    assert decode(content, max_pixels=400 * 400).size == (400, 400)


def test_a_decompression_bomb():
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # PNG's width and height
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    assert reason(bytes(header), max_pixels=10**12) is SkipReason.TOO_LARGE


def rgb(image, kind="PNG"):
    return np.array(decode(encoded(image, kind), max_pixels=LIMIT))


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert rgb(image).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_transparent_palette_entry_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1)
    pixels = np.array(decode(buffer.getvalue(), max_pixels=LIMIT))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = picture((200, 200, 200)).convert(mode)
    assert rgb(image, "TIFF").shape == (32, 32, 3)


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = Image.fromarray(np.array([[0, 128 * 256, 255 * 256]], dtype=np.uint16))
    assert rgb(grey)[0, :, 0].tolist() == [0, 128, 255]


def rotated():
    """A 40x20 image that EXIF says must be turned by 90 degrees."""
    image = picture((200, 0, 0), size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    assert decode(rotated(), max_pixels=LIMIT).size == (20, 40)


def test_the_size_from_the_header_is_that_of_the_decoded_image(tmp_path):
    for content in (rotated(), encoded(picture((1, 2, 3), size=(40, 20)))):
        image = decode(content, max_pixels=LIMIT)
        file = tmp_path / "image"
        file.write_bytes(content)
        assert upright_size(content, max_pixels=LIMIT) == (image.height, image.width)
        assert upright_size(file, max_pixels=LIMIT) == (image.height, image.width)


def test_a_format_that_runs_other_programs_is_not_tried():
    buffer = io.BytesIO()
    picture((9, 9, 9)).save(buffer, "EPS")
    assert reason(buffer.getvalue()) is SkipReason.CORRUPT
