import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from diffalign.data.pairs.index import bucket_sizes, nearest_bucket
from diffalign.data.pairs.transforms import Cut, cut
from tests.layouts import solid_image


def columns_image(width, height):
    """Each pixel's red value is its column."""
    red = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    return Image.fromarray(np.stack([red, red * 0, red * 0], axis=-1))


def test_an_image_of_the_target_size_is_untouched():
    image = solid_image((10, 200, 30), size=(16, 16))
    result = cut(image, Cut(target=(16, 16)))
    assert torch.equal(result.pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert result.pixels.dtype == torch.uint8
    assert (result.original_size, result.corner) == ((16, 16), (0, 0))


def test_a_wide_image_is_cut_in_the_middle():
    result = cut(columns_image(40, 16), Cut(target=(16, 16)))
    assert result.corner == (0, 12)  # (40 - 16) / 2
    assert result.original_size == (16, 40)
    assert result.pixels[0, 0].tolist() == list(range(12, 28))


def test_a_tall_image_is_cut_in_the_middle():
    assert cut(solid_image((9, 9, 9), size=(16, 40)), Cut(target=(16, 16))).corner == (12, 0)


def test_the_corner_is_measured_after_the_resize():
    result = cut(solid_image((9, 9, 9), size=(80, 32)), Cut(target=(16, 16)))
    assert result.original_size == (32, 80)
    assert result.corner == (0, 12)  # 80x32 -> 40x16


@pytest.mark.parametrize(("place", "left"), [(0.0, 0), (0.5, 12), (0.999, 24)])
def test_a_place_moves_the_crop_from_left_to_right(place, left):
    result = cut(columns_image(40, 16), Cut(target=(16, 16), place=(0.3, place)))
    assert result.corner == (0, left)
    assert result.pixels[0, 0, 0] == left


@pytest.mark.parametrize("place", [0.0, 0.25, 0.999])
def test_the_corner_of_a_mirrored_image_is_that_of_mirroring_first(place):
    image = columns_image(40, 16)
    mirrored = cut(image, Cut(target=(16, 16), place=(0.0, place), mirrored=True))
    pixels = np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    top, left = mirrored.corner
    assert mirrored.pixels[0].tolist() == pixels[top : top + 16, left : left + 16, 0].tolist()


def test_mirroring_a_centred_crop_of_even_slack_keeps_the_corner():
    assert cut(columns_image(40, 16), Cut(target=(16, 16), mirrored=True)).corner == (0, 12)


@pytest.mark.parametrize("size", [(17, 16), (16, 31), (7, 5), (333, 517), (1, 1), (1, 900)])
def test_any_shape_covers_the_target(size):
    result = cut(solid_image((9, 9, 9), size=size), Cut(target=(16, 24), place=(0.9, 0.9)))
    assert result.pixels.shape == (3, 16, 24)
    assert result.corner[0] >= 0
    assert result.corner[1] >= 0


def test_resizing_agrees_with_torchvision():
    image = solid_image((200, 90, 30), size=(75, 50))
    theirs = transforms.Compose(
        [
            transforms.Resize(16, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(16),
            transforms.PILToTensor(),
        ]
    )(image)
    assert torch.equal(cut(image, Cut(target=(16, 16))).pixels, theirs)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 32), (64, 8)])
def test_buckets_keep_area_and_step(resolution, step):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert (width, height) in sizes
        assert 0.6 * resolution**2 < height * width <= resolution**2
        assert resolution // 2 <= height <= 2 * resolution


def test_sdxl_buckets_hold_the_ones_of_the_paper():
    assert {(512, 2048), (768, 1280), (768, 1344), (1344, 768)} <= set(bucket_sizes(1024))


def test_the_nearest_bucket_goes_by_aspect_ratio_of_both_sides():
    sizes = ((16, 32), (16, 16), (32, 16))
    assert nearest_bucket(sizes, ((100, 210), (50, 100))) == 0
    assert nearest_bucket(sizes, ((100, 200), (200, 100))) == 1
    assert nearest_bucket(sizes, ((900, 500), (900, 500))) == 2
