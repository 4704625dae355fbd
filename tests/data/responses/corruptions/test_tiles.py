import pytest
import torch

from diffalign.data.responses.corruptions.tiles import to_tiles, with_tiles
from diffalign.errors import ModelError
from tests.data.encoders import FAMILIES, encoder, loaded, user
from tests.layouts import solid_image

IMAGES = [solid_image((200, 100, 50), size=size) for size in [(20, 12), (8, 30)]]


def shown(family):
    return encoder(family).prompt(user("<image><image>"), IMAGES).image_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_go_back_to_where_they_were(family):
    image_inputs, image_processor = shown(family), loaded(family)[1].image_processor
    tiles = to_tiles(image_inputs, image_processor)
    assert len(tiles) == 2
    again = with_tiles(image_inputs, tiles, image_processor)
    assert again.keys() == image_inputs.keys()
    for key, values in image_inputs.items():
        assert torch.equal(again[key], values)


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("llava", [(1, 3, 8, 8)] * 2),
        ("llava_next", [(5, 3, 8, 8)] * 2),
        ("qwen2_vl", [(16, 3, 4, 4), (16, 3, 4, 4)]),
    ],
)
def test_each_image_is_a_stack_of_tiles(family, shapes):
    tiles = to_tiles(shown(family), loaded(family)[1].image_processor)
    assert [tuple(each.shape) for each in tiles] == shapes


def test_a_patch_has_its_channels_apart():
    red = solid_image((255, 0, 0), size=(16, 16))
    image_inputs = encoder("qwen2_vl").prompt(user("<image>"), [red]).image_inputs
    (tiles,) = to_tiles(image_inputs, loaded("qwen2_vl")[1].image_processor)
    assert tiles[:, 0].std() > 0
    assert tiles[:, 1].std() == pytest.approx(0, abs=1e-6)  # no green anywhere
    assert tiles[:, 2].std() == pytest.approx(0, abs=1e-6)


def test_a_layout_that_is_not_known_is_refused():
    with pytest.raises(ModelError, match=r"shape \[2, 3, 4\].*crop, noise, replaced or random"):
        to_tiles({"pixel_values": torch.zeros(2, 3, 4)}, object())
