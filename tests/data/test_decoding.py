import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffalign.data.decoding import (
    BadImageError,
    content_of,
    decode,
    encoded_image,
    ends_whole,
    upright_size,
)
from diffalign.data.skipping import SkipReason
from tests.layouts import encoded, solid_image

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
    image = solid_image((200, 200, 200)).convert(mode)
    assert rgb(image, "TIFF").shape == (32, 32, 3)


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = Image.fromarray(np.array([[0, 128 * 256, 255 * 256]], dtype=np.uint16))
    assert rgb(grey)[0, :, 0].tolist() == [0, 128, 255]


def rotated():
    """A 40x20 image that EXIF says must be turned by 90 degrees."""
    image = solid_image((200, 0, 0), size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    assert decode(rotated(), max_pixels=LIMIT).size == (20, 40)


def test_the_size_from_the_header_is_that_of_the_decoded_image(tmp_path):
    for content in (rotated(), encoded(solid_image((1, 2, 3), size=(40, 20)))):
        image = decode(content, max_pixels=LIMIT)
        file = tmp_path / "image"
        file.write_bytes(content)
        assert upright_size(content, max_pixels=LIMIT) == (image.height, image.width)
        assert upright_size(file, max_pixels=LIMIT) == (image.height, image.width)


def test_a_format_that_runs_other_programs_is_not_tried():
    buffer = io.BytesIO()
    solid_image((9, 9, 9)).save(buffer, "EPS")
    assert reason(buffer.getvalue()) is SkipReason.CORRUPT


def turned(kind, orientation, compression=None):
    """A 40x20 image, red on the left, with an orientation tag."""
    image = Image.new("RGB", (40, 20), (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, 20, 20))
    buffer = io.BytesIO()
    if kind == "TIFF":
        image.save(buffer, kind, tiffinfo={0x0112: orientation}, compression=compression)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_in_every_format(kind, orientation):
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    content = turned(kind, orientation)
    image = decode(content)
    assert upright_size(content, max_pixels=LIMIT) == (image.height, image.width)
    assert image.size == ((20, 40) if orientation >= 5 else (40, 20))
    corners = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom"}
    place = {"left": (2, 10), "right": (37, 10), "top": (10, 2), "bottom": (10, 37)}
    red = image.getpixel(place[corners.get(orientation, "bottom")])
    assert red[0] > 150 and red[2] < 60


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "jpeg"])
def test_a_turned_tiff_of_any_compression(compression):
    content = turned("TIFF", 6, compression)
    assert decode(content).size == (20, 40)
    assert upright_size(content, max_pixels=LIMIT) == (40, 20)


def tiff(values, *, photometric=2):
    """An uncompressed TIFF of [H, W, C] of any type, as Pillow does not write them."""
    height, width, channels = values.shape
    bits = values.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    lists = struct.pack(f"<{channels}H", *[bits] * channels)
    lists += struct.pack(f"<{channels}H", *[kind] * channels)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, 8 if channels > 2 else bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8 + len(lists)),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, values.nbytes),
        (339, 3, channels, 8 + 2 * channels if channels > 2 else kind),
    ]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(lists) + len(data))
    return head + lists + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_sixteen_bit_colour_keeps_its_brightness():
    values = np.array([[[0, 128 * 256, 255 * 256]]], dtype=np.uint16)
    assert np.array(decode(tiff(values))).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("scale", [1, 255])
def test_floating_point_grey(scale):
    values = np.array([[[0.0], [0.5], [1.0]]], dtype=np.float32) * scale
    levels = np.array(decode(tiff(values, photometric=1)))[0, :, 0].tolist()
    assert levels == [0, 128, 255]


@pytest.mark.parametrize("worst", [1e4, -1.0, np.nan, np.inf])
def test_floating_point_grey_of_no_known_range_is_refused(worst):
    values = np.array([[[0.0], [0.5], [worst]]], dtype=np.float32)
    assert reason(tiff(values, photometric=1)) is SkipReason.CORRUPT


def test_thirty_two_bit_grey():
    values = np.array([[[0], [128 * 256], [255 * 256]]], dtype=np.int32)
    assert np.array(decode(tiff(values, photometric=1)))[0, :, 0].tolist() == [0, 128, 255]


def test_a_transparent_sixteen_bit_grey_lies_over_white():
    grey = Image.fromarray(np.array([[0, 128 * 256 + 7, 255 * 256]], dtype=np.uint16))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", transparency=128 * 256 + 7)
    assert np.array(decode(buffer.getvalue()))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP"])
def test_of_several_pages_or_frames_the_first_is_seen(kind):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    buffer = io.BytesIO()
    pages[0].save(buffer, kind, save_all=True, append_images=pages[1:])
    assert decode(buffer.getvalue()).getpixel((1, 1))[0] > 150


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_the_inks_of_cmyk(kind):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = decode(encoded(cyan, kind)).getpixel((4, 4))
    assert red < 20 and green > 235 and blue > 235


def test_an_embedded_profile_says_the_colours():
    lab = ImageCms.createProfile("LAB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (2, 2), (10, 200, 90))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile)
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (10, 200, 90)  # of sRGB nothing changes
    swapped = profile.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    for name in (b"sRGB", "sRGB".encode("utf-16-be")):
        swapped = swapped.replace(name, name.replace(b"R", b"Q"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=swapped)
    red, green, _ = decode(buffer.getvalue()).getpixel((0, 0))
    assert red > 150 and green < 60  # a profile whose red and green are exchanged
    for broken in (b"no profile", ImageCms.ImageCmsProfile(lab).tobytes()):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", icc_profile=broken)
        assert decode(buffer.getvalue()).getpixel((0, 0)) == (10, 200, 90)


@pytest.mark.parametrize(
    "value",
    [
        "images/a.png",
        "images\\a.png",
        ".\\images\\a.png",
        {"path": "images\\a.png", "bytes": None},
        {"bytes": encoded(solid_image((200, 0, 0)))},
        bytearray(encoded(solid_image((200, 0, 0)))),
        base64.b64encode(encoded(solid_image((200, 0, 0)))).decode(),
        base64.encodebytes(encoded(solid_image((200, 0, 0)))).decode(),
        base64.b64encode(encoded(solid_image((200, 0, 0)), "JPEG")).decode(),
        "data:image/png;base64," + base64.b64encode(encoded(solid_image((200, 0, 0)))).decode(),
        {"bytes": base64.b64encode(encoded(solid_image((200, 0, 0)))).decode(), "path": "a.png"},
    ],
)
def test_the_forms_that_a_column_of_images_may_have(value, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(solid_image((200, 0, 0))))
    assert decode(encoded_image(value, tmp_path)).size == (32, 32)


def test_a_file_address_and_a_name_with_a_backslash(tmp_path):
    file = tmp_path / "a b\\c.png"
    file.write_bytes(encoded(solid_image((200, 0, 0))))
    assert encoded_image(file.as_uri(), None) == file
    assert encoded_image("a b\\c.png", tmp_path) == file


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, SkipReason.MALFORMED),
        (1.5, SkipReason.MALFORMED),
        (True, SkipReason.MALFORMED),
        (["a.png"], SkipReason.MALFORMED),
        ({"url": "x"}, SkipReason.MALFORMED),
        ({}, SkipReason.MALFORMED),
        ({"bytes": [1, 2]}, SkipReason.MALFORMED),
        ("", SkipReason.MISSING_IMAGE),
        ({"bytes": None, "path": None}, SkipReason.MISSING_IMAGE),
        ("https://example.org/a.png", SkipReason.MISSING_IMAGE),
        ("a\0.png", SkipReason.MISSING_IMAGE),
        ("\ud800.png", SkipReason.MISSING_IMAGE),
        ("x" * 5000, SkipReason.MISSING_IMAGE),
        ("data:image/png;base64,????", SkipReason.CORRUPT),
        ("folder", SkipReason.MISSING_IMAGE),
        ("loop", SkipReason.MISSING_IMAGE),
        ("pipe", SkipReason.MISSING_IMAGE),
    ],
)
def test_what_is_no_image_has_a_reason(value, expected, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadImageError) as error:
        decode(encoded_image(value, tmp_path))
    assert error.value.reason is expected


def test_a_jpeg_under_the_name_of_a_png(tmp_path):
    (tmp_path / "A.PNG").write_bytes(encoded(solid_image((200, 0, 0)), "JPEG"))
    assert decode(Path(tmp_path / "A.PNG")).size == (32, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_end_of_a_file_tells_whether_it_is_whole(kind):
    content = encoded(noise(), kind)
    assert ends_whole(content) and ends_whole(content + bytes(20))
    assert not ends_whole(content[: len(content) // 2])
    assert not ends_whole(content[:-100])


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_a_format_without_an_end_never_seems_whole(kind):
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    assert not ends_whole(encoded(noise(), kind))


def test_the_content_of_an_image_is_that_of_its_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    assert content_of(tmp_path / "a.png") == content_of(b"abc") == b"abc"
    for nothing in (None, b"", tmp_path / "gone.png"):
        with pytest.raises(BadImageError):
            content_of(nothing)


def test_a_look_that_need_not_be_sharp_decodes_a_jpeg_at_a_fraction():
    large = encoded(noise().resize((512, 256)), "JPEG")
    assert decode(large, at_least=64).size == (128, 64)
    assert decode(large).size == (512, 256)
    assert decode(encoded(noise(), "PNG"), at_least=8).size == (64, 64)
    assert decode(large, at_least=1000).size == (512, 256)


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch):
    content = encoded(noise(), "PNG")
    monkeypatch.setattr(
        "PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("it was decoded")
    )
    assert upright_size(content, max_pixels=LIMIT) == (64, 64)


def test_a_png_may_say_its_orientation_behind_its_pixels():
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    noise().resize((64, 32)).save(buffer, "PNG", exif=turned)
    assert upright_size(buffer.getvalue(), max_pixels=LIMIT) == (64, 32)
