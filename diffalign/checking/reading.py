"""A data set read once, by several processes: bytes and headers of all images, pixels of some."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from torch.utils.data import DataLoader, Dataset

from diffalign.checking.rows import (
    CheckedRow,
    ImageFacts,
    Kind,
    Look,
    Place,
    ResponseFacts,
)
from diffalign.checking.similarity import look_of
from diffalign.data.decoding import (
    BadImageError,
    EncodedImage,
    content_of,
    decode,
    ends_whole,
    upright_size,
)
from diffalign.data.loader import ignore_interrupts
from diffalign.data.pairs.formats.base import OpenedPairs
from diffalign.data.pairs.groups import GroupRows, GroupStream
from diffalign.data.pairs.samples import empty_caption
from diffalign.data.responses.reading import OpenedResponses
from diffalign.data.responses.records import ResponsePair
from diffalign.data.rows import AbstractRows, AbstractRowStream, Row
from diffalign.data.skipping import LeftOut, Skipped
from diffalign.errors import DataError

_ROWS_AT_ONCE = 500
"""Rows that a process reads before it hands them over, where they are read at random."""
_OF_A_STREAM = 0.02
_SHOWN_WORDS = 60


class _Unit(NamedTuple):
    """Rows that one process reads."""

    part: int | None
    """Of a stream; None where rows are read at random."""
    start: int
    stop: int | None
    """None for all of a part."""


@dataclass(frozen=True, kw_only=True)
class PixelShare:
    """Which images are decoded: those whose digest, as a number in [0, 1), is below a share. So it
    is the same ones in every run, and equal files are decoded together."""

    share: float

    def __contains__(self, digest: bytes) -> bool:
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


@dataclass(frozen=True, kw_only=True)
class AbstractCheckedData(abc.ABC, Dataset):
    """An opened data set whose rows can be checked; a worker indexes it by units."""

    kind: ClassVar[Kind]
    max_pixels: int
    pixels: PixelShare = field(default_factory=lambda: PixelShare(share=0))
    along: tuple[str, ...] = ()
    """Columns that are kept with a row."""

    @property
    @abc.abstractmethod
    def rows(self) -> AbstractRows | AbstractRowStream:
        """The rows of the data set."""

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """What is read by what, and the mapping, as a sentence."""

    @abc.abstractmethod
    def records(self, row: Row, place: Place) -> Iterator[tuple[CheckedRow, Sequence[Any]]]:
        """The preferences of a row, each with its encoded images by the order of its sides."""

    @property
    def images_per_row(self) -> int:
        """About how many images a row has."""
        return 1

    @cached_property
    def count(self) -> int | None:
        """About how many rows there are; None where that shows in reading."""
        rows = self.rows
        return len(rows) if isinstance(rows, AbstractRows) else rows.about_rows

    def share_of(self, images: int) -> PixelShare:
        """About so many images, all where there are no more; of a stream that does not say how
        many it has, one of fifty."""
        count = self.count
        if count is None:
            return PixelShare(share=_OF_A_STREAM)
        return PixelShare(share=min(1.0, images / max(1, count * self.images_per_row)))

    def units(self, limit: int | None) -> list[_Unit]:
        """All rows, or the first so many."""
        rows = self.rows
        if isinstance(rows, AbstractRowStream):
            return [_Unit(part, 0, limit) for part in range(len(rows.parts))]
        count = len(rows) if limit is None else min(limit, len(rows))
        starts = range(0, count, _ROWS_AT_ONCE)
        return [_Unit(None, start, min(start + _ROWS_AT_ONCE, count)) for start in starts]

    def __getitem__(self, unit: _Unit) -> tuple[list[CheckedRow], dict[bytes, Look]] | DataError:
        known: dict[bytes, ImageFacts] = {}
        looks: dict[bytes, Look] = {}
        found = []
        try:
            for place, row in self._of_unit(unit):
                for record, images in self.records(row, place):
                    facts = [self._facts(image, known, looks) for image in images]
                    sides = dict(zip(record.images, facts, strict=True))
                    found.append(dataclasses.replace(record, images=sides) if sides else record)
        except DataError as error:
            return error
        return found, looks

    def _of_unit(self, unit: _Unit) -> Iterator[tuple[Place, Row]]:
        rows = self.rows
        if isinstance(rows, AbstractRowStream):
            assert unit.part is not None
            for cursor, row in islice(rows.rows(unit.part), unit.stop):
                yield Place(unit.part, cursor), row
        else:
            assert unit.stop is not None
            for number in range(unit.start, unit.stop):
                yield Place(number, None), rows[number]

    def read_again(self, row: CheckedRow) -> dict[str, EncodedImage]:
        """The images of a row by side."""
        rows = self.rows
        if isinstance(rows, AbstractRowStream):
            _, again = next(rows.rows(row.place.part, row.place.cursor))
        else:
            again = rows[row.place.part]
        records = list(self.records(again, row.place))
        record, images = records[min(row.place.nth, len(records) - 1)]
        return dict(zip(record.images, images, strict=True))

    def _facts(
        self, encoded: EncodedImage, known: dict[bytes, ImageFacts], looks: dict[bytes, Look]
    ) -> ImageFacts:
        """What is known of an image; decoded if it is one of the sample or seems to be cut off."""
        try:
            content = content_of(encoded)
        except BadImageError as error:
            return ImageFacts(None, reason=error.reason, detail=error.detail)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in known:
            try:
                size = upright_size(content, max_pixels=self.max_pixels)
                if digest in self.pixels:
                    looks[digest] = look_of(content, max_pixels=self.max_pixels)
                elif not ends_whole(content):
                    decode(content, max_pixels=self.max_pixels)
                known[digest] = ImageFacts(digest, size)
            except BadImageError as error:
                known[digest] = ImageFacts(digest, reason=error.reason, detail=error.detail)
        return known[digest]

    def _values(self, row: Row) -> dict[str, Any]:
        return {name: row.values.get(name) for name in self.along}


@dataclass(frozen=True, kw_only=True)
class CheckedPairs(AbstractCheckedData):
    """Pairs of images."""

    kind: ClassVar[Kind] = "images"
    data: OpenedPairs

    @property
    def rows(self) -> AbstractRows | AbstractRowStream:
        return self.data.rows

    @property
    def summary(self) -> str:
        return self.data.summary

    @property
    def images_per_row(self) -> int:
        return len(self.data.columns.sides)

    @property
    def grouped(self) -> bool:
        """Whether every two images of a row are a pair."""
        return isinstance(self.data.rows, (GroupRows, GroupStream))

    def records(self, row: Row, place: Place) -> Iterator[tuple[CheckedRow, Sequence[Any]]]:
        columns = self.data.columns
        origin = row.name.rpartition("[")[0] if self.grouped else row.name
        plain = CheckedRow(name=row.name, origin=origin, place=place)
        pair = self.data.read(row)
        if isinstance(pair, Skipped):
            yield dataclasses.replace(plain, skipped=pair), ()
            return
        decided = columns.scores is not None or columns.preferred is not None
        has_first = decided and not self.grouped
        values = self._values(row)
        scores = _numbers([row.values[n] for n in columns.scores]) if columns.scores else None
        if isinstance(pair, LeftOut):
            caption = columns.caption_or_none(row) or ""
            yield (
                dataclasses.replace(
                    plain, prompt=caption, left_out=pair, scores=scores, values=values
                ),
                (),
            )
            return
        sides = {side: getattr(pair, side) for side in columns.sides}
        yield (
            dataclasses.replace(
                plain,
                prompt=pair.prompt,
                skipped=empty_caption(pair.sample_id, pair.prompt),
                first_won=columns.chosen(row) == 0 if has_first else None,
                scores=scores,
                images=dict.fromkeys(sides, _NOT_SEEN),
                values=values,
            ),
            list(sides.values()),
        )

    def prompts(self) -> Iterator[str]:
        """The captions of all rows; no image is read where columns can be read by themselves."""
        columns, rows = self.data.columns, self.data.rows
        if isinstance(rows, AbstractRowStream):
            read = rows.only(columns.light()).all_rows()
        else:
            read = rows.scan(columns.light())
        return (caption for row in read if (caption := columns.caption_or_none(row)))


_NOT_SEEN = ImageFacts(None)


def _numbers(values: Sequence[Any]) -> tuple[float, float] | None:
    try:
        first, second = map(float, values)
    except (TypeError, ValueError):
        return None
    return first, second


@dataclass(frozen=True, kw_only=True)
class CheckedResponses(AbstractCheckedData):
    """Responses about images, or about text alone."""

    kind: ClassVar[Kind] = "responses"
    data: OpenedResponses

    @property
    def rows(self) -> AbstractRows:
        return self.data.rows

    @property
    def summary(self) -> str:
        return self.data.summary

    def records(self, row: Row, place: Place) -> Iterator[tuple[CheckedRow, Sequence[Any]]]:
        values = self._values(row)
        for nth, pair in enumerate(self.data.pairs_of(row)):
            plain = CheckedRow(
                name=row.name, origin=row.name, place=place._replace(nth=nth), values=values
            )
            if isinstance(pair, Skipped):
                yield dataclasses.replace(plain, name=pair.sample_id, skipped=pair), ()
            elif isinstance(pair, LeftOut):
                yield dataclasses.replace(plain, left_out=pair), ()
            else:
                images = _images_of(pair)
                record = dataclasses.replace(
                    plain,
                    name=pair.sample_id,
                    prompt="\n".join(turn.text for turn in pair.turns),
                    images=dict.fromkeys(images, _NOT_SEEN),
                    responses={
                        side: _response(text)
                        for side, text in pair.responses.items()
                        if side in ("chosen", "rejected")
                    },
                )
                yield record, list(images.values())

    def texts(self, row: CheckedRow) -> dict[str, str]:
        """The prompt and the responses of a row, cut to a length that a page can show."""
        again = self.data.pairs_of(self.data.rows[row.place.part])
        pair = again[min(row.place.nth, len(again) - 1)]
        if not isinstance(pair, ResponsePair):
            return {}
        texts = {"prompt": pair.turns[-1].text, **pair.responses}
        return {name: _shortened(text) for name, text in texts.items()}


def _images_of(pair: ResponsePair) -> dict[str, EncodedImage]:
    """Every image that some view of a pair shows, each once."""
    images = list(pair.images)
    for conversation in pair.own.values():
        images += [image for image in conversation.images if image not in images]
    for others in pair.other_images.values():
        images += [image for image in others if image not in images]
    return {f"image {number}": image for number, image in enumerate(images, start=1)}


def _response(text: str) -> ResponseFacts:
    plain = text.strip().encode(errors="surrogatepass")
    return ResponseFacts(hashlib.blake2b(plain, digest_size=16).digest(), len(text.split()))


def _shortened(text: str) -> str:
    words = text.split()
    more = " ..." if len(words) > _SHOWN_WORDS else ""
    return " ".join(words[:_SHOWN_WORDS]) + more


def read_all(
    data: AbstractCheckedData,
    *,
    workers: int,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[CheckedRow], dict[bytes, Look]]:
    """Every preference of a data set in order, and the looks of the images that were decoded.

    Args:
        data: what to read.
        workers: processes that read; 0 reads in this one.
        limit: only the first so many preferences; None for all.
        advance: told of the preferences that were read.

    Raises:
        DataError: the data set cannot be read to its end.
    """
    units = data.units(limit)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=units,
        num_workers=min(workers, len(units)) if len(units) > 1 else 0,
        collate_fn=_as_it_is,
        worker_init_fn=ignore_interrupts,
    )
    rows: list[CheckedRow] = []
    looks: dict[bytes, Look] = {}
    try:
        for found in loader:
            if isinstance(found, DataError):
                raise found
            part, part_looks = found
            rows += part if limit is None else part[: limit - len(rows)]
            looks |= part_looks
            advance(len(part))
            if limit is not None and len(rows) >= limit:
                break
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that reads the data ended ({error}): as a rule the system kills one where "
            "memory runs out. Lower workers (0 reads in this process), or set limit"
        ) from error
    return rows, looks


def _as_it_is(found: Any) -> Any:
    return found
