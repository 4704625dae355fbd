"""A condition: what is in place of the images of a sample.

A response that is no less probable next to other images does not depend on its own. Objectives
that want it to compare `chosen` with `chosen@crop`, where `crop` names a condition of the config.
What is random in a condition comes from (run seed, sample, sample, condition, image) alone, so that
policy and reference see the same.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffalign.ranges import Ranged


class Origin(enum.Enum):
    """Whose images a condition starts from."""

    OWN = "the sample's own"
    ROW = "those that the data set gives in their place, under the name of the condition"
    ANOTHER = "those of another sample"


@dataclass(frozen=True, kw_only=True)
class AbstractCondition(Ranged, abc.ABC):
    """One way of putting something else in place of an image.

    It works on the image before the processor, which sees size and shape kept, or on what the
    processor made of it; each hook leaves things as they are unless it is implemented. Either way
    the number of image tokens stays.
    """

    @property
    @abc.abstractmethod
    def origin(self) -> Origin:
        """Whose images it starts from. Those of others are first resized to the own ones."""

    def image(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Another image of the same size.

        Args:
            image: RGB; not to be changed in place.
            generator: on the CPU; of this image in this sample.
        """
        return image

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        """Other normalised pixel values.

        Args:
            tiles: one image as the processor cut it, [tiles, channels, height, width]: the whole
                of it, crops of several scales, or the patches of a grid. Not to be changed in
                place.
            generator: as for `image`.

        Returns:
            The same shape.
        """
        return tiles
