"""A detector of GenEval's scorer that makes no mistakes: the oracle reads the playground's images.

Classes are the shapes of the playground; their colours are known, and every object is certain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from diffalign.playground.oracle import locate_objects
from diffalign.playground.scenes import SHAPES
from diffalign.scorers.geneval.detectors.base import AbstractDetector, Detected


@dataclass(frozen=True, kw_only=True)
class PlaygroundDetector(AbstractDetector):
    """Circles, squares, triangles and crosses, with their colours."""

    knows_colours = True

    @property
    def fingerprint(self) -> str:
        return "playground-detector-1"

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(SHAPES)

    def detect(self, images: Sequence[Image.Image]) -> list[Mapping[str, Sequence[Detected]]]:
        found: list[Mapping[str, Sequence[Detected]]] = []
        for image in images:
            by_shape: defaultdict[str, list[Detected]] = defaultdict(list)
            for each in locate_objects(image):
                by_shape[each.kind.shape].append(
                    Detected(box=each.box, score=1.0, mask=each.mask, colour=each.kind.colour)
                )
            found.append(dict(by_shape))
        return found
