"""The objects that a response mentions, held against those of its image, as CHAIR counts them.

Source: Rohrbach et al. 2018, Object hallucination in image captioning, arXiv:1809.02156.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffalign.response_rules.coco_objects import ObjectWords


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A response that describes an image."""

    image_id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class CheckedCaption:
    """The objects of one caption, held against the image."""

    caption: Caption
    mentions: tuple[str, ...]
    """The class of every mention, repetitions included."""
    hallucinated: tuple[str, ...]
    """Those mentions whose class is not in the image."""
    truth: frozenset[str]
    """The classes in the image."""

    @property
    def found(self) -> frozenset[str]:
        """The classes in the image that the caption mentions."""
        return self.truth & frozenset(self.mentions)

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        return {
            "image_id": self.caption.image_id,
            "caption": self.caption.text,
            "mentions": self.mentions,
            "hallucinated": self.hallucinated,
            "missed": sorted(self.truth - self.found),
        }


def check(caption: Caption, truth: frozenset[str], objects_of: ObjectWords) -> CheckedCaption:
    """Hold one caption against the classes of its image."""
    mentions = tuple(objects_of(caption.text))
    return CheckedCaption(
        caption=caption,
        mentions=mentions,
        hallucinated=tuple(mention for mention in mentions if mention not in truth),
        truth=truth,
    )
