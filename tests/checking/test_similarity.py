from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.checking import similarity
from diffalign.checking.rows import Look
from diffalign.checking.similarity import look_of, near_duplicates, near_hashes
from tests.checking.planted import jpeg, noise_image, png

GREY = bytes([128]) * 192


def hashes(count: int, *, seed: int = 0) -> np.ndarray:
    """Random ones, a third of them with up to six bits of an earlier one changed."""
    generator = np.random.default_rng(seed)
    found = generator.integers(0, 2**64, count, dtype=np.uint64)
    for place in range(count // 3):
        flipped = generator.choice(64, generator.integers(0, 7), replace=False)
        mask = sum(1 << int(bit) for bit in flipped)
        found[count - 1 - place] = np.uint64(int(found[place]) ^ mask)
    return found


def all_with_all(values: np.ndarray, bits: int) -> set[tuple[int, int]]:
    plain = [int(value) for value in values]
    return {
        (i, j)
        for i in range(len(plain))
        for j in range(i + 1, len(plain))
        if bin(plain[i] ^ plain[j]).count("1") <= bits
    }


@pytest.mark.parametrize("bits", [0, 1, 4, 6])
@pytest.mark.parametrize("most", [2000, 3])
def test_the_search_finds_what_comparing_all_with_all_finds(bits, most, monkeypatch):
    values = hashes(150)
    if most == 3:  # buckets of few hashes, so that none is larger
        values = np.unique(values)
    monkeypatch.setattr(similarity, "_MOST_COMPARED", most)
    found = {
        tuple(sorted(pair)) for part in near_hashes(values, bits=bits) for pair in part.tolist()
    }
    if most == 2000:
        assert found == all_with_all(values, bits)
    else:
        assert found <= all_with_all(values, bits)
    assert found or bits == 0


def test_a_group_is_held_together_by_pairs():
    looks = [Look(0, GREY), Look(0b1111, GREY), Look(0b11111111, GREY), Look(2**64 - 1, GREY)]
    assert near_duplicates(looks, bits=4, levels=6) == [[0, 1, 2]]
    assert near_duplicates(looks, bits=3, levels=6) == []
    assert near_duplicates([*looks, Look(2**64 - 1, GREY)], bits=0, levels=6) == [[3, 4]]
    assert (
        near_duplicates(looks[:1], bits=4, levels=6) == near_duplicates([], bits=4, levels=6) == []
    )


def test_equal_hashes_of_other_colours_are_not_alike():
    looks = [look_of(png(Image.new("RGB", (32, 32), c)), max_pixels=9999) for c in ("red", "blue")]
    assert looks[0].hash == looks[1].hash
    assert near_duplicates(looks, bits=4, levels=6) == []
    assert near_duplicates(looks, bits=4, levels=255) == [[0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_an_image_saved_anew_or_scaled_looks_alike_and_another_does_not(seed):
    image = noise_image(seed, pixels=256)
    variants = [
        png(image),
        jpeg(image, quality=40),
        jpeg(image.resize((128, 128), Image.Resampling.LANCZOS)),
        jpeg(image.resize((512, 512), Image.Resampling.BICUBIC)),
        jpeg(noise_image(seed + 100, pixels=256)),
    ]
    looks = [look_of(content, max_pixels=10**6) for content in variants]
    assert near_duplicates(looks, bits=4, levels=6) == [[0, 1, 2, 3]]
