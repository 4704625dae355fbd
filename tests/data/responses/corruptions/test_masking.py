import pytest
import torch

from diffalign.data.responses.corruptions.block_mask import BlockMask
from diffalign.data.responses.corruptions.masking import set_to_mean
from diffalign.data.responses.corruptions.pixel_mask import PixelMask
from diffalign.seeding import cpu_generator


def tiles(count=2, height=28, width=42):
    return torch.randn(count, 3, height, width, generator=cpu_generator(7))


def changed(before, after):
    """Positions that differ, [tiles, height, width]; in all channels or in none."""
    differ = before != after
    assert torch.equal(differ.all(dim=1), differ.any(dim=1))
    return differ.all(dim=1)


def test_the_share_of_positions_is_exact_and_rounded_down():
    before = tiles()
    after = PixelMask(fraction=0.3).pixels(before, cpu_generator(0))
    assert int(changed(before, after).sum()) == int(2 * 28 * 42 * 0.3)


def test_hidden_positions_have_the_mean_over_channels_and_positions():
    before = tiles()
    after = PixelMask(fraction=0.5).pixels(before, cpu_generator(0))
    hidden = changed(before, after)[:, None].expand_as(after)
    assert (after[hidden] == before.mean()).all()
    assert torch.equal(after[~hidden], before[~hidden])


def test_blocks_are_hidden_as_a_whole():
    before = tiles()
    after = BlockMask(fraction=0.5).pixels(before, cpu_generator(0))
    blocks = changed(before, after).unflatten(1, (2, 14)).unflatten(3, (3, 14))
    whole = blocks.all(dim=4).all(dim=2)
    assert torch.equal(whole, blocks.any(dim=4).any(dim=2))
    assert int(whole.sum()) == 6  # half of 2 x 2 x 3


def test_a_border_that_no_block_fits_has_smaller_ones():
    before = tiles(1, 15, 14)
    after = set_to_mean(before, fraction=1.0, block=14, generator=cpu_generator(0))
    assert changed(before, after).all()


def test_nothing_is_hidden_at_zero():
    assert torch.equal(PixelMask(fraction=0.0).pixels(tiles(), cpu_generator(0)), tiles())


@pytest.mark.parametrize("kind", [PixelMask, BlockMask])
def test_a_fraction_is_part_of_a_whole(kind):
    with pytest.raises(ValueError, match="from 0 to 1, got 30"):
        kind(fraction=30)


def test_a_block_has_a_size():
    with pytest.raises(ValueError, match="block must be at least 1"):
        BlockMask(block=0)
