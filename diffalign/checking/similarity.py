"""Near-duplicate images: perceptual hashes, and a search that does not compare all with all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffalign.checking.rows import Look
from diffalign.data.decoding import EncodedImage, decode

_HASH_SIDE = 8
_TILE_SIDE = 8
_AT_LEAST = 64
"""Pixels of a side that are decoded at least: the hash sees 32 x 32."""
_MOST_COMPARED = 2000
"""Hashes of one bucket that are compared with each other; of a larger bucket each is compared with
so many that follow it in order."""
_BITS = np.array([bin(number).count("1") for number in range(1 << 16)], dtype=np.uint8)


def look_of(encoded: EncodedImage, *, max_pixels: int) -> Look:
    """How an image looks.

    Raises:
        BadImageError: it cannot be decoded.
    """
    image = decode(encoded, max_pixels=max_pixels, at_least=_AT_LEAST)
    bits = np.packbits(imagehash.phash(image, hash_size=_HASH_SIDE).hash)
    tile = image.resize((_TILE_SIDE, _TILE_SIDE), Image.Resampling.BOX).tobytes()
    return Look(int.from_bytes(bits.tobytes(), "big"), tile)


def near_duplicates(looks: Sequence[Look], *, bits: int, levels: float) -> list[list[int]]:
    """Groups of images that look alike, of two or more each.

    Two are alike where their hashes differ in at most `bits` bits, and their 8 x 8 tiles by at most
    `levels` in root mean square; a group is held together by such pairs.

    Args:
        looks: of the images.
        bits: of 64.
        levels: of 255; a hash knows no colours.

    Returns:
        Indices, rising, groups in the order of their first.
    """
    if len(looks) < 2:
        return []
    distinct, of = np.unique(_records(looks), axis=0, return_inverse=True)
    of = of.reshape(-1)
    hashes = distinct[:, :_HASH_SIDE].copy().view(">u8").astype(np.uint64).reshape(-1)
    tiles = distinct[:, _HASH_SIDE:]
    pairs = [
        pair[_difference(tiles[pair[:, 0]], tiles[pair[:, 1]]) <= levels]
        for pair in near_hashes(hashes, bits=bits)
    ]
    edges = np.concatenate([*pairs, np.empty((0, 2), dtype=np.int64)])
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(distinct),) * 2)
    _, groups = connected_components(graph, directed=False)
    return _listed(groups[of])


def near_hashes(hashes: NDArray[np.uint64], *, bits: int) -> Iterator[NDArray[np.int64]]:
    """Pairs of hashes that differ in at most `bits` bits, each [n, 2]; some may come twice.

    The 64 bits are cut into `bits + 1` bands. Two hashes with so few differences agree in at least
    one of them, so only those that share a band are compared.
    """
    edges = np.linspace(0, 64, bits + 2).round().astype(int)
    for start, stop in itertools.pairwise(edges):
        band = (hashes >> np.uint64(start)) & np.uint64((1 << int(stop - start)) - 1)
        order = np.lexsort((hashes, band))
        bounds = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, bounds):
            if len(bucket) > 1:
                yield from _in_bucket(hashes, bucket, bits)


def _in_bucket(
    hashes: NDArray[np.uint64], bucket: NDArray[np.int64], bits: int
) -> Iterator[NDArray[np.int64]]:
    own = hashes[bucket]
    if len(bucket) <= _MOST_COMPARED:
        near = np.argwhere(np.triu(_differing_bits(own[:, None], own[None, :]) <= bits, k=1))
        yield bucket[near]
        return
    for number in range(len(bucket) - 1):
        others = slice(number + 1, number + 1 + _MOST_COMPARED)
        near = bucket[others][_differing_bits(own[number], own[others]) <= bits]
        yield np.stack([np.full(len(near), bucket[number]), near], axis=1)


def _differing_bits(
    ones: NDArray[np.uint64] | np.uint64, others: NDArray[np.uint64]
) -> NDArray[np.int64]:
    differing = np.ascontiguousarray(ones ^ others)
    words = differing.view(np.uint16).reshape(*differing.shape, 4)
    return _BITS[words].sum(axis=-1, dtype=np.int64)


def _difference(ones: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square over pixels and colours, [n]."""
    squares = (ones.astype(np.int32) - others) ** 2
    return np.sqrt(squares.mean(axis=1))


def _records(looks: Sequence[Look]) -> NDArray[np.uint8]:
    """Hash and tile of each, as bytes [n, 8 + 192]."""
    whole = b"".join(look.hash.to_bytes(8, "big") + look.tile for look in looks)
    return np.frombuffer(whole, dtype=np.uint8).reshape(len(looks), -1)


def _listed(groups: NDArray[np.int32]) -> list[list[int]]:
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    found = [part.tolist() for part in np.split(order, bounds) if len(part) > 1]
    return sorted(found, key=lambda group: group[0])
