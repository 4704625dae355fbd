"""The objects that a response mentions, held against those of its image, as CHAIR counts them.

Source: Rohrbach et al. 2018, Object hallucination in image captioning, arXiv:1809.02156.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

    @property
    def repeated(self) -> tuple[str, ...]:
        """The mentions whose class was mentioned before."""
        return tuple(m for n, m in enumerate(self.mentions) if m in self.mentions[:n])

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        return {
            "image_id": self.caption.image_id,
            "caption": self.caption.text,
            "mentions": self.mentions,
            "hallucinated": self.hallucinated,
            "repeated": self.repeated,
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


Repeated = Literal["once", "wrong"]
"""What a second mention of one class counts for: nothing, or like one that is not there."""


def truthfulness(
    mentions: Sequence[str],
    truth: frozenset[str],
    *,
    recall: float = 1.0,
    repeated: Repeated = "once",
) -> float:
    """How truthful and complete a description is, from 0 to 1.

    It is the mean of two shares, of the mentioned classes that are there (1 where none is
    mentioned) and of those there that are mentioned (1 where there is none), which counts `recall`
    times. Without the second, saying nothing would be best; with it, a class that is named twice
    in place of one that is missed gains nothing.

    Args:
        mentions: the class of every mention.
        truth: the classes in the image.
        recall: at least 0.
        repeated: see `Repeated`; `wrong` suits descriptions that name each object once.
    """
    distinct = set(mentions)
    found = len(distinct & truth)
    counted = len(distinct) if repeated == "once" else len(mentions)
    right = found / counted if counted else 1.0
    complete = found / len(truth) if truth else 1.0
    return (right + recall * complete) / (1 + recall)
