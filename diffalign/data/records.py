"""What a reader yields: one preference, before anything of it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EncodedImage = bytes | Path
"""A file's content, or where it lies. Decoding waits for the loader's workers, where a bad image
can be skipped and listed."""


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Two images for one prompt, one of them preferred."""

    sample_id: str
    """Unique within the data set and stable between runs: randomness derives from it."""
    prompt: str
    """The caption as the data set has it; may be empty here, the loader skips and lists it."""
    chosen: EncodedImage
    """The preferred side."""
    rejected: EncodedImage
    """The other side."""
