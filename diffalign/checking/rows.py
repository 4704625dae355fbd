"""What checks read of a data set: a record a row, without a pixel."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from diffalign.data.decoding import Size
from diffalign.data.pairs.columns import PAIR_VIEWS
from diffalign.data.rows import Cursor
from diffalign.data.skipping import LeftOut, Skipped, SkipReason

Kind = Literal["images", "responses"]
"""What is preferred to what."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """A file of an image, as its bytes and its header are."""

    digest: bytes | None
    """BLAKE2b of the file, 16 bytes: equal where the bytes are. None where there is none."""
    size: Size | None = None
    """(height, width) of the upright image; None where it is not known."""
    reason: SkipReason | None = None
    """Why it cannot be used."""
    detail: str = ""
    """The words of the decoder."""


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """A response without its text."""

    digest: bytes
    """BLAKE2b of the text without blanks around it, 16 bytes."""
    words: int
    """Parts between blanks."""


class Place(NamedTuple):
    """Where a row can be read again."""

    part: int
    """Of a stream; the row's number where rows are read at random."""
    cursor: Cursor | None
    """In the part; None where rows are read at random."""
    nth: int = 0
    """Which pair of the row it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRow:
    """One preference of a data set."""

    name: str
    """Its place in the data set, as messages say it."""
    origin: str
    """The row that it is read from: the same for all pairs of a row with several images."""
    place: Place
    prompt: str = ""
    """Caption, or the text of the conversation; empty where the row cannot be read."""
    left_out: LeftOut | None = None
    """Why it holds no preference; None where it does."""
    skipped: Skipped | None = None
    """Why it cannot be used, whatever its images are."""
    first_won: bool | None = None
    """Whether the image that the data set names first is the preferred one; None where it has no
    first and second."""
    scores: tuple[float, float] | None = None
    """Numbers of the first and of the second image."""
    images: Mapping[str, ImageFacts] = field(default_factory=dict)
    """Side -> image: `chosen` and `rejected` of image pairs, `image 1` and so on of responses."""
    responses: Mapping[str, ResponseFacts] = field(default_factory=dict)
    """`chosen` and `rejected`, or one of them; none of image pairs."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Columns that were read along for some check."""

    @property
    def is_pair(self) -> bool:
        """Whether it holds a preference that can be read; its images may still be damaged."""
        return self.left_out is None and self.skipped is None

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of its images that can be used, in order."""
        found = self.images.values()
        return tuple(i.digest for i in found if i.digest is not None and i.reason is None)


class Look(NamedTuple):
    """How an image looks, roughly."""

    hash: int
    """Perceptual hash of its brightness, 64 bits."""
    tile: bytes
    """The image at 8 x 8 pixels, RGB: what the hash does not tell, its colours."""


class SeenAt(NamedTuple):
    """An image of a row, by number."""

    row: int
    side: str


@dataclass(frozen=True, kw_only=True)
class OtherData:
    """What a data set must not share its prompts with."""

    name: str
    keys: frozenset[str | bytes]
    """Of its rows, see `Examined.keys`."""
    own: frozenset[int] = frozenset()
    """Numbers of those rows of the data set that are this held-out data themselves."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A data set as checks see it."""

    kind: Kind
    summary: str
    """What was read, and the mapping, as a sentence."""
    rows: Sequence[CheckedRow]
    """All of them, in order."""
    noun: str = "rows"
    """What one of `rows` is, in the plural."""
    grouped: bool = False
    """Whether rows hold several images, of which every two are a pair: there is no first then."""
    looks: Mapping[bytes, Look] = field(default_factory=dict)
    """Digest -> look, of the images that were decoded."""
    decoded: str = ""
    """Which images were decoded, in words."""
    others: Sequence[OtherData] = ()
    """Held-out data."""
    resolution: int | None = None
    """That of the training run, if there is one."""
    scores_are_votes: bool = False
    """Whether `scores` count votes."""
    confidence: float = 0.95
    """Of intervals."""

    @cached_property
    def pairs(self) -> list[tuple[int, CheckedRow]]:
        """The rows that hold a preference, with their numbers."""
        return [(number, row) for number, row in enumerate(self.rows) if row.is_pair]

    @cached_property
    def keys(self) -> list[str | bytes | None]:
        """What tells by row whether others are about the same: the prompt as `plain_text` has it;
        of responses about images, the images. None where a row has neither."""
        return [key_of(row) for row in self.rows]

    def shown(self) -> Iterator[tuple[SeenAt, ImageFacts]]:
        """Every image of a row that holds a preference."""
        for number, row in self.pairs:
            for side, image in row.images.items():
                yield SeenAt(number, side), image

    @cached_property
    def seen(self) -> dict[bytes, list[SeenAt]]:
        """Digest -> where it is, of the images that can be used."""
        found: dict[bytes, list[SeenAt]] = {}
        for place, image in self.shown():
            if image.digest is not None and image.reason is None:
                found.setdefault(image.digest, []).append(place)
        return found


def key_of(row: CheckedRow) -> str | bytes | None:
    """See `Examined.keys`."""
    if row.images and not set(row.images) <= set(PAIR_VIEWS):
        digests = row.digests
        return b"".join(digests) if len(digests) == len(row.images) else None
    return plain_text(row.prompt) or None


_PUNCTUATION = string.punctuation + "\N{HORIZONTAL ELLIPSIS}"


def plain_text(text: str) -> str:
    """A prompt without what two spellings of it may differ in: case, blanks, compatible characters,
    and punctuation at its ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_PUNCTUATION + " ")
