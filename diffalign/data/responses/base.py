"""What the columns of a data set of answers mean: the contract of a mapping."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.records import EncodedImage, LeftOut, Skipped, SkipReason, UnusableRowError
from diffalign.data.responses.conversation import malformed, with_markers
from diffalign.data.responses.images import images_of
from diffalign.data.responses.records import IMAGE, ResponsePair, Span, Turn


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the text of a row says: a conversation and the answers to it."""

    turns: tuple[Turn, ...]
    """As in `ResponsePair`; markers may be missing altogether."""
    responses: Mapping[str, str]
    """See `ResponsePair`."""
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """See `ResponsePair`."""


class AbstractMapping(abc.ABC):
    """One published form of preferences between answers. Its module is its `kind`."""

    needs: ClassVar[frozenset[str]]
    """Columns without which a data set has another form, besides that of the images."""
    image_columns: ClassVar[tuple[str, ...]] = ("images", "image")
    """Names that the column of the images goes by, the preferred one first. A null or an empty list
    under `images` means a conversation without any; elsewhere a null is a missing image."""
    images_optional: ClassVar[bool] = False
    """Whether a data set may have no such column."""
    replacements: ClassVar[Mapping[str, str]] = {}
    """Condition -> column with pictures that take the place of the images under it."""
    responses: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """The answers that every row offers."""
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

    def image_column(self, columns: Collection[str]) -> str | None:
        """The column of the images; None where there is none."""
        return next((name for name in self.image_columns if name in columns), None)

    def heavy_columns(self) -> frozenset[str]:
        """Columns of images, which decide nothing about the text of a row."""
        return frozenset({*self.image_columns, *self.replacements.values()})

    def describe_needs(self) -> str:
        """For example `chosen, prompt, rejected and images (or image)`."""
        first, *others = self.image_columns
        images = f"{first} (or {', '.join(others)})" if others else first
        return f"{', '.join(sorted(self.needs))} and {'perhaps ' * self.images_optional}{images}"

    def checked(
        self, values: Mapping[str, Any], sample_id: str
    ) -> list[Comparison | LeftOut | Skipped]:
        """What `comparisons` finds, with the comparisons that cannot be used as skips.

        Those have an empty prompt, an empty response, or the same chosen and rejected response
        where no other picture could tell them apart.
        """
        try:
            found = self.comparisons(values)
        except UnusableRowError as error:
            return [error.skipped(sample_id)]
        result: list[Comparison | LeftOut | Skipped] = []
        for place, comparison in enumerate(found):
            try:
                if isinstance(comparison, Comparison):
                    _check_text(comparison, may_be_alike="rejected" in self.replacements)
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
    ) -> ResponsePair | Skipped:
        """A comparison with its images, or why it cannot be used.

        Where no turn has an image marker, all markers go in front of the first text of the user, as
        TRL puts them.

        Args:
            comparison: one that is usable as text.
            values: column -> value of the whole row.
            sample_id: of the pair.
            folder: from which relative file names start.
        """
        column = self.image_column(values)
        found = values[column] if column is not None else None
        without_any = not found and (
            column == "images" or (column is None and self.images_optional)
        )
        images = () if without_any else images_of(found or None, folder)
        pair = ResponsePair(
            sample_id=sample_id,
            images=images,
            turns=with_markers(comparison.turns, len(images)),
            responses=comparison.responses,
            pictures={
                condition: self._replacement(values, name, folder) or images
                for condition, name in self.replacements.items()
            },
            spans=comparison.spans,
        )
        try:
            _check_images(pair)
        except UnusableRowError as error:
            return error.skipped(sample_id)
        return pair

    def _replacement(
        self, values: Mapping[str, Any], name: str, folder: Path | None
    ) -> tuple[EncodedImage, ...]:
        """Pictures that take the place of the images; none where they are optional and absent."""
        value = values.get(name)
        return images_of(value, folder) if value or name in self.needs else ()


def numbered(sample_id: str, place: int, count: int) -> str:
    """The id of one of the comparisons of a row: the row's own where it is the only one."""
    return sample_id if count == 1 else f"{sample_id}#{place}"


def _check_text(comparison: Comparison, *, may_be_alike: bool) -> None:
    if not comparison.turns or comparison.turns[-1].role != "user":
        raise malformed("the conversation before the answer does not end with the user's turn")
    if not comparison.turns[-1].text.replace(IMAGE, "").strip():
        raise UnusableRowError(SkipReason.EMPTY_PROMPT, repr(comparison.turns[-1].text))
    for name, response in comparison.responses.items():
        if not response.strip():
            raise UnusableRowError(SkipReason.EMPTY_RESPONSE, repr(response), name)
        if IMAGE in response:
            raise UnusableRowError(SkipReason.MARKERS, f"{IMAGE} in a response", name)
    if not may_be_alike:
        _check_difference(comparison.responses)


def _check_difference(responses: Mapping[str, str]) -> None:
    if responses["chosen"].strip() == responses["rejected"].strip():
        raise UnusableRowError(SkipReason.IDENTICAL, f"both are {responses['chosen']!r:.60}")


def _check_images(pair: ResponsePair) -> None:
    markers = sum(turn.text.count(IMAGE) for turn in pair.turns)
    if markers != len(pair.images):
        raise UnusableRowError(
            SkipReason.MARKERS,
            f"{markers} {IMAGE} in the prompt, and images in the row: {len(pair.images)}",
        )
    for condition, pictures in {"images": pair.images, **pair.pictures}.items():
        if len(pictures) != len(pair.images):
            raise UnusableRowError(
                SkipReason.MARKERS,
                f"{len(pictures)} pictures of {condition} for {len(pair.images)} images",
                condition,
            )
        if None in pictures:
            raise UnusableRowError(
                SkipReason.MISSING_IMAGE,
                f"number {pictures.index(None) + 1} of {len(pictures)} is null",
                None if condition == "images" else condition,
            )
    if pair.pictures.get("rejected", pair.images) == pair.images:
        _check_difference(pair.responses)
