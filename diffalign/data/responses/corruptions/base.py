"""A condition: what stands in place of the pictures of a sample.

A response that is no less probable beside other pictures does not depend on its own. Objectives
that want it to compare `chosen` with `chosen@crop`, where `crop` names a condition of the config.
What is random in a condition comes from (run seed, sample, draw, condition, picture) alone, so that
policy and reference see the same.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor


class Origin(enum.Enum):
    """Whose pictures a condition starts from."""

    OWN = "the sample's own"
    ROW = "those that the data set gives in their place, under the name of the condition"
    ANOTHER = "those of another sample"


@dataclass(frozen=True, kw_only=True)
class AbstractCondition(abc.ABC):
    """One way of putting something else in place of a picture.

    It works on the picture before the processor, which sees size and shape kept, or on what the
    processor made of it; each hook leaves things as they are unless it is implemented. Either way
    the number of image tokens stays.
    """

    @property
    @abc.abstractmethod
    def origin(self) -> Origin:
        """Whose pictures it starts from. Those of others are first resized to the own ones."""

    def picture(self, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        """Another picture of the same size.

        Args:
            picture: RGB; not to be changed in place.
            generator: on the CPU; of this picture in this draw.
        """
        return picture

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        """Other normalised pixel values.

        Args:
            tiles: one picture as the processor cut it, [tiles, channels, height, width]: the whole
                of it, crops of several scales, or the patches of a grid. Not to be changed in
                place.
            generator: as for `picture`.

        Returns:
            The same shape.
        """
        return tiles
