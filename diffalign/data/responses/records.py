"""Records that a mapping yields: responses to one conversation about images, still encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.data.decoding import EncodedImage
from diffalign.data.strength.base import NOTHING_ASKED, Strength

IMAGE = "<image>"
"""Marks in the text of a turn where an image is; the chat template puts the model's own."""

COMPETING = frozenset({"chosen", "rejected"})
"""The responses of which one is preferred to the other."""


@dataclass(frozen=True)
class Position:
    """Which image of the row's column a block of a message shows."""

    index: int
    """Counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    """With one `IMAGE` per image that it shows, where the image is."""
    images: tuple[Any, ...] = ()
    """What the message itself says of its images, one entry a marker: an image in any spelling that
    a column may have, a `Position`, or None for the next image of the column. Empty where it says
    nothing, and always in a `ResponsePair`."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a response about which the data set says something."""

    start: int
    """First character, counted from 0."""
    end: int
    """The character after the last one."""
    label: str | None = None
    """What kind of part it is, in the words of the data set, such as `hallucination`."""
    score: float | None = None
    """How good it is, on the data set's scale."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages and images that a response belongs to."""

    turns: tuple[Turn, ...]
    """Up to the response; the last turn is the user's."""
    images: tuple[EncodedImage, ...]
    """In reading order: as many as there are `IMAGE` markers in the turns."""


@dataclass(frozen=True, kw_only=True)
class ResponsePair:
    """A conversation about images, and the responses to its last turn."""

    sample_id: str
    """Unique within the data set and stable between runs: randomness derives from it."""
    images: tuple[EncodedImage, ...]
    """In reading order: as many as there are `IMAGE` markers in the turns."""
    turns: tuple[Turn, ...]
    """The conversation up to the response; the last turn is the user's."""
    responses: Mapping[str, str]
    """`chosen` and `rejected`, and what else the data set has, such as `revised` or `gold`; one of
    the two alone where rows are unpaired."""
    own: Mapping[str, Conversation] = field(default_factory=dict)
    """The conversation of a response, where that is another one than `turns`, or one about
    other images than `images`."""
    paired: bool = True
    """Whether the responses compete; False where each row holds one, desirable or not."""
    other_images: Mapping[str, tuple[EncodedImage, ...]] = field(default_factory=dict)
    """Images in place of `images` by condition, such as `retrieved`; as many as `images`."""
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """Parts of responses that the data set judges, by response, in order and without overlap."""

    strength: Strength = NOTHING_ASKED
    """How sure the preference is, and how much the pair counts."""

    def conversation(self, response: str) -> Conversation:
        """The messages and images that a response belongs to."""
        return self.own.get(response) or Conversation(turns=self.turns, images=self.images)
