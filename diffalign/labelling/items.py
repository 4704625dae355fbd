"""What people are asked to compare: items of any origin behind one contract.

An item is a prompt and two or more sides: images, or responses to a conversation about images.
Where it comes from, and which model made which side, stays on this side of the server.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffalign.data.decoding import MAX_PIXELS, EncodedImage, content_of, decode
from diffalign.data.responses.records import Turn

_KEPT = 24
"""Images that are held ready for browsers."""
_FASTEST = 1
"""Of zlib's levels: an image goes over a local line once."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question, without its images and texts."""

    item_id: str
    """Unique among the items and stable between starts; never shown, since it may tell a model."""
    sides: int
    """How many images or responses are compared."""
    models: tuple[str, ...] = ()
    """Of each side, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is shown of an item, in the order of the data."""

    prompt: str
    """Of the images; empty where `turns` say it."""
    images: tuple[EncodedImage, ...]
    """One a side; of responses those of the conversation, in reading order."""
    turns: tuple[Turn, ...] = ()
    """The conversation that responses go on."""
    responses: tuple[str, ...] = ()
    """One a side, where responses are compared."""

    def digests(self) -> tuple[str, ...]:
        """What each side is told by: SHA-256 of the image's file or of the response.

        Raises:
            BadImageError: an image cannot be read.
        """
        if self.responses:
            return tuple(_sha256(text.encode()) for text in self.responses)
        return tuple(_sha256(content_of(image)) for image in self.images)


class AbstractItems(abc.ABC):
    """Items of one origin. A source says what they are, and writes nothing."""

    shows: ClassVar[Literal["images", "responses"]] = "images"
    """What the sides are."""
    summary: str
    """The origin as a sentence for whoever starts the server."""
    fingerprint: str
    """Another one for other data; empty where answers alone tell, by the digests of what was
    shown."""
    items: Sequence[Item]
    """All of them, in the order of the data."""
    passed_over: dict[str, int]
    """Reason -> how many rows of the data are no items."""

    @abc.abstractmethod
    def content(self, number: int) -> Content:
        """The images and texts of an item.

        Raises:
            BadImageError: there is no such image.
            UnusableRowError: the row cannot be used.
        """


class ShownImages:
    """Images of items as browsers get them: PNG files without anything but pixels.

    They are decoded as for training and written anew, so that neither the format nor what a program
    noted in the file tells which model an image is of.
    """

    def __init__(self, items: AbstractItems, *, max_pixels: int = MAX_PIXELS) -> None:
        self._items, self._max_pixels = items, max_pixels
        self._content = functools.lru_cache(maxsize=_KEPT)(items.content)
        self._png = functools.lru_cache(maxsize=_KEPT)(self._encoded)

    def content(self, number: int) -> Content:
        """As of the items; the last ones are kept."""
        return self._content(number)

    def png(self, number: int, place: int) -> bytes:
        """The image of an item, by its place in the content.

        Raises:
            BadImageError: it cannot be decoded.
            UnusableRowError: the row cannot be used.
        """
        return self._png(number, place)

    def check(self, number: int) -> None:
        """Raise as `png` does unless all images of an item can be shown."""
        content = self.content(number)
        content.digests()
        for place in range(len(content.images)):
            self.png(number, place)

    def _encoded(self, number: int, place: int) -> bytes:
        image = decode(self.content(number).images[place], max_pixels=self._max_pixels)
        buffer = io.BytesIO()
        image.save(buffer, format="png", compress_level=_FASTEST)
        return buffer.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
