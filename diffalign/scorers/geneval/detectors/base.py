"""The contract of a detector: objects of an image by class, with what is sure of them."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffalign.ranges import Ranged

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels from the upper left corner."""


@dataclass(frozen=True, kw_only=True)
class Detected:
    """One object that was found."""

    box: Box
    score: float
    """How sure the detector is, 0 to 1."""
    mask: NDArray[np.bool_] | None = None
    """Which pixels show it, shape [H, W]; None of a detector that finds boxes alone."""
    colour: str | None = None
    """Where the detector knows it; None leaves it to a classifier."""


@dataclass(frozen=True, kw_only=True)
class AbstractDetector(Ranged, abc.ABC):
    """What finds objects; its fields are the settings of a config. Weights are loaded when they
    are first needed."""

    knows_colours = False
    """Whether each object comes with its colour."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Equal fingerprints find the same objects in equal images."""

    @property
    @abc.abstractmethod
    def classes(self) -> frozenset[str]:
        """Classes that can be found, by the names that GenEval has for them."""

    @abc.abstractmethod
    def detect(self, images: Sequence[Image.Image]) -> list[Mapping[str, Sequence[Detected]]]:
        """Objects of RGB images by class, however unsure, in any order."""

    def to(self, device: torch.device | str) -> Any:
        """Move weights, if there are any; returns the detector itself."""
        return self


GENEVAL_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names that labels of COCO go by -> those of GenEval's prompts."""


def class_name(label: str) -> str:
    """A label of a detector by the name that GenEval's metadata has for it."""
    return GENEVAL_NAMES.get(label, label)


def box_of(mask: NDArray[np.bool_]) -> Box:
    """The box around a mask that is not empty; right and bottom lie behind its last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
