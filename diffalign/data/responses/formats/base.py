"""Meaning of the columns of a data set of responses: the contract of a mapping."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.decoding import EncodedImage
from diffalign.data.responses.conversation import TEMPLATED, Comparison, malformed
from diffalign.data.responses.images import conversation_of, images_of
from diffalign.data.responses.records import COMPETING, IMAGE, Conversation, ResponsePair, Turn
from diffalign.data.skipping import LeftOut, Skipped, SkipReason, UnusableRowError
from diffalign.data.strength.base import NOTHING_ASKED, Strength


class AbstractMapping(abc.ABC):
    """One published form of preferences between responses. Its module is its `kind`."""

    needs: ClassVar[frozenset[str]]
    """Columns without which a data set has another form, besides that of the images."""
    image_columns: ClassVar[tuple[str, ...]] = ("images", "image")
    """Names that the column of the images goes by, the preferred one first. A null or an empty list
    under `images` means a conversation without any; elsewhere a null is a missing image."""
    images_optional: ClassVar[bool] = False
    """Whether a data set may have no such column."""
    replacements: ClassVar[Mapping[str, str]] = {}
    """Condition -> column with images that take the place of the images under it."""
    own_images: ClassVar[Mapping[str, str]] = {}
    """Response -> column with the images that it is about, where they are not those of the row."""
    responses: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """The responses that every row offers; that some row offers, where rows are unpaired."""
    scored: ClassVar[bool] = False
    """Whether comparisons have scores of both responses (`Comparison.scores`)."""
    paired: ClassVar[bool] = True
    """Whether a row holds responses that compete; False where it holds one, desirable (`chosen`) or
    not (`rejected`)."""
    summary: ClassVar[str]
    """Which column is what, as half a sentence for the user."""

    @abc.abstractmethod
    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison | LeftOut]:
        """The preferences that a row holds, or why it holds none. Reads no image.

        Args:
            values: column -> value; the columns of images may be absent.

        Raises:
            UnusableRowError: the row has not the form of its data set.
        """

    def fits(self, first: Mapping[str, Any]) -> bool:
        """Whether a data set that begins with this row has this form."""
        has_images = self.images_optional or self.image_column(first) is not None
        return has_images and self.needs <= set(first) and self.recognises(first)

    def recognises(self, first: Mapping[str, Any]) -> bool:
        """Whether values have this form, where the names of the columns alone do not tell."""
        return True

    def image_column(self, columns: Mapping[str, Any]) -> str | None:
        """The column of the images; None where there is none. Of several, the first that has one in
        this row."""
        found = [name for name in self.image_columns if name in columns]
        return next((name for name in found if columns[name]), found[0] if found else None)

    def heavy_columns(self) -> frozenset[str]:
        """Columns of images, which decide nothing about the text of a row."""
        others = (*self.replacements.values(), *self.own_images.values())
        return frozenset({*self.image_columns, *others})

    def describe_needs(self) -> str:
        """For example `chosen, prompt, rejected and images (or image)`."""
        first, *others = self.image_columns
        images = f"{first} (or {', '.join(others)})" if others else first
        return f"{', '.join(sorted(self.needs))} and {'perhaps ' * self.images_optional}{images}"

    def checked(
        self, values: Mapping[str, Any], sample_id: str, *, keep_ties: bool = False
    ) -> list[Comparison | LeftOut | Skipped]:
        """The result of `comparisons`, with the comparisons that cannot be used as skips, and ties
        left out unless they are kept.

        Those have an empty prompt, an empty response, or the same chosen and rejected response
        where no other image could tell them apart.
        """
        try:
            _check_media(values)
            found = self.comparisons(values)
        except UnusableRowError as error:
            return [error.skipped(sample_id)]
        result: list[Comparison | LeftOut | Skipped] = []
        for place, comparison in enumerate(found):
            try:
                if isinstance(comparison, Comparison):
                    if not keep_ties and is_tie(comparison):
                        result.append(LeftOut.TIE)
                        continue
                    _check_text(comparison, may_be_alike="rejected" in self.own_images)
                result.append(comparison)
            except UnusableRowError as error:
                result.append(error.skipped(numbered(sample_id, place, len(found))))
        return result

    def pair(
        self,
        comparison: Comparison,
        values: Mapping[str, Any],
        *,
        sample_id: str,
        folder: Path | None,
        strength: Strength = NOTHING_ASKED,
    ) -> ResponsePair | Skipped:
        """A comparison with its images, or why it cannot be used.

        Images are those of the row's column, or those that messages hold. Where no turn has an
        image marker, all markers go in front of the first text of the user, as TRL puts them.

        Args:
            comparison: one that is usable as text.
            values: column -> value of the whole row.
            sample_id: of the pair.
            folder: from which relative file names start.
            strength: of the preference.
        """
        try:
            found = self._pair(comparison, values, sample_id=sample_id, folder=folder)
            return dataclasses.replace(found, strength=strength)
        except UnusableRowError as error:
            return error.skipped(sample_id)

    def _pair(
        self,
        comparison: Comparison,
        values: Mapping[str, Any],
        *,
        sample_id: str,
        folder: Path | None,
    ) -> ResponsePair:
        shown = self._shown(comparison.turns, values)
        whole = _conversation(comparison.turns, shown, folder)
        own: dict[str, Conversation] = {}
        for name in comparison.responses:
            column = values.get(self.own_images.get(name, ""))
            if name in comparison.contexts or column:
                turns = comparison.contexts.get(name, comparison.turns)
                images = _as_list(column) if column else self._shown(turns, values)
                conversation = _conversation(turns, images, folder, name)
                if conversation != whole:
                    own[name] = conversation
        pair = ResponsePair(
            sample_id=sample_id,
            images=whole.images,
            turns=whole.turns,
            responses=comparison.responses,
            own=own,
            paired=self.paired,
            other_images={
                condition: self._replacement(values, name, folder) or whole.images
                for condition, name in self.replacements.items()
            },
            spans=comparison.spans,
        )
        _check_replacements(pair, free=frozenset(self.own_images))
        if self.paired and not own.keys() & COMPETING:
            _check_difference(pair.responses)
        return pair

    def _shown(self, turns: Sequence[Turn], values: Mapping[str, Any]) -> Sequence[Any]:
        """The values of the column of images; one null where a row should have an image and none is
        there."""
        column = self.image_column(values)
        found = values[column] if column is not None else None
        if found is not None and found != "" and found != []:
            return _as_list(found)
        optional = column == "images" or (column is None and self.images_optional)
        held = any(image is not None for turn in turns for image in turn.images)
        return () if optional or held else (None,)

    def _replacement(
        self, values: Mapping[str, Any], name: str, folder: Path | None
    ) -> tuple[EncodedImage, ...]:
        """Images that take the place of the images; none where they are optional and absent."""
        value = values.get(name)
        return images_of(value, folder) if value or name in self.needs else ()


def is_tie(comparison: Comparison) -> bool:
    """Whether the scores of a comparison are equal."""
    return comparison.scores is not None and comparison.scores[0] == comparison.scores[1]


def numbered(sample_id: str, place: int, count: int) -> str:
    """The id of one of the comparisons of a row: the row's own where it is the only one."""
    return sample_id if count == 1 else f"{sample_id}#{place}"


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _conversation(
    turns: Sequence[Turn], column: Sequence[Any], folder: Path | None, side: str | None = None
) -> Conversation:
    """`conversation_of`, and a check of its markers; `side` is whose it is."""
    try:
        found = conversation_of(turns, column, folder)
        _check_images(found)
    except UnusableRowError as error:
        raise UnusableRowError(error.reason, error.detail, error.side or side) from error
    return found


def _check_text(comparison: Comparison, *, may_be_alike: bool) -> None:
    _check_turns(comparison.turns, None)
    for side, turns in comparison.contexts.items():
        _check_turns(turns, side)
    for name, response in comparison.responses.items():
        _check_characters(response, name)
        _check_template(response, name)
        if not response.strip():
            raise UnusableRowError(SkipReason.EMPTY_RESPONSE, repr(response), name)
        if IMAGE in response:
            raise UnusableRowError(SkipReason.MARKERS, f"{IMAGE} in a response", name)
    if not may_be_alike and not comparison.contexts.keys() & COMPETING:
        _check_difference(comparison.responses)


_OTHER_MEDIA = ("videos", "video", "audios", "audio")


def _check_media(values: Mapping[str, Any]) -> None:
    """Raise UnusableRowError where a row shows something that is no image."""
    for name in _OTHER_MEDIA:
        value = values.get(name)
        if isinstance(value, (str, bytes, Mapping, list)) and value and value != [None]:
            raise malformed(
                f"the row has {name} ({value!r:.60}), and images are all that is seen: take "
                f"the row out, or the column if it is not to be seen"
            )


def _check_template(text: str, side: str | None) -> None:
    """Raise UnusableRowError for a text in which a chat template has been written already."""
    found = TEMPLATED.search(text)
    if found is not None:
        raise malformed(
            f"{found[0]!r:.60} belongs to a chat template or to another program's placeholders, "
            f"and the model brings its own: write plain text or a list of messages, and images in "
            f"a column",
            side,
        )


def _check_characters(text: str, side: str | None) -> None:
    """Raise UnusableRowError for half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise malformed(f"no valid text: {text[error.start :]!r:.60}", side) from error


def _check_turns(turns: Sequence[Turn], side: str | None) -> None:
    for turn in turns:
        _check_characters(turn.text, side)
        _check_template(turn.text, side)
    if not turns or turns[-1].role != "user":
        raise malformed(
            "the conversation before the response does not end with the user's turn", side
        )
    if not turns[-1].text.replace(IMAGE, "").strip():
        raise UnusableRowError(SkipReason.EMPTY_PROMPT, repr(turns[-1].text), side)


def _check_difference(responses: Mapping[str, str]) -> None:
    chosen, rejected = responses.get("chosen"), responses.get("rejected")
    if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
        raise UnusableRowError(SkipReason.IDENTICAL, f"both are {chosen!r:.60}")


def _check_images(conversation: Conversation) -> None:
    markers = sum(turn.text.count(IMAGE) for turn in conversation.turns)
    images = conversation.images
    if markers != len(images):
        raise UnusableRowError(
            SkipReason.MARKERS,
            f"{markers} {IMAGE} in the prompt, and images in the row: {len(images)}",
        )
    _check_there(images, None)


def _check_there(images: Sequence[EncodedImage], side: str | None) -> None:
    if None in images:
        raise UnusableRowError(
            SkipReason.MISSING_IMAGE,
            f"number {images.index(None) + 1} of {len(images)} is null",
            side,
        )


def _check_replacements(pair: ResponsePair, *, free: frozenset[str]) -> None:
    """As many under every condition; `free` are those next to a response of their own."""
    for condition, other_images in pair.other_images.items():
        if len(other_images) != len(pair.images) and condition not in free:
            raise UnusableRowError(
                SkipReason.MARKERS,
                f"{len(other_images)} other_images of {condition} for {len(pair.images)} images",
                condition,
            )
        _check_there(other_images, condition)
