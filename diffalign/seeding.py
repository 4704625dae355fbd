"""Randomness as data: every random choice is a function of (run seed, sample id, visit).

What is random about a visit of a sample does not depend on the batch it lands in, on the rank that
reads it, or on the device that trains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any identifying parts, the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def unit_interval(*parts: int | str) -> float:
    """A number in [0, 1), uniform over the parts; 53 random bits."""
    return (derive_seed(*parts) >> 10) / 2**53


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that its stream is the same whatever the device of the model."""
    return torch.Generator(device="cpu").manual_seed(seed)


def noise_from_seeds(seeds: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, one row a seed.

    Args:
        seeds: one per row.
        shape: of one row, for example (4, 64, 64).

    Returns:
        Shape [B, *shape], float32, on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=cpu_generator(seed)) for seed in seeds])
