"""Where items come from: folders of `diffalign generate`, data sets of image pairs, responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.scored import sides_of
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.formats.base import numbered
from diffalign.data.responses.reading import open_responses
from diffalign.data.rows import AbstractRowStream, Row
from diffalign.data.skipping import LeftOut, Skipped, UnusableRowError
from diffalign.errors import DataError
from diffalign.files import inside
from diffalign.generation.manifest import MANIFEST, ManifestRow, read_manifest
from diffalign.labelling.items import AbstractItems, Content, Item
from diffalign.rollouts.groups import GROUPS, read_groups

Compare = Literal["auto", "models", "seeds"]


class GeneratedImages(AbstractItems):
    """Images of a folder's manifest: of several models from the same noise, or of several seeds of
    one model, for the same prompt."""

    fingerprint = ""

    def __init__(self, folder: Path, *, compare: Compare = "auto", together: bool = False) -> None:
        """Read the manifest, and see which of its images are there.

        Args:
            folder: that `diffalign generate` wrote.
            compare: what the sides of an item differ in; `auto` takes models where there are
                several.
            together: whether all sides are one item, to be ranked, or every two of them one.

        Raises:
            DataError: there is no such list, or nothing in it to compare.
        """
        rows = read_manifest(folder)
        there = [row for row in rows if inside(folder, row.file).is_file()]
        self.passed_over = {"missing image": len(rows) - len(there)} if there != rows else {}
        self._folder = folder
        models = list(dict.fromkeys(row.model for row in there))
        by_models = len(models) > 1 if compare == "auto" else compare == "models"
        self._rows: list[tuple[ManifestRow, ...]] = []
        for group in _grouped(there, _same_noise if by_models else _same_model):
            self._rows += [tuple(group)] if together else combinations(group, 2)
        self._rows = [sides for sides in self._rows if len(sides) > 1]
        if not self._rows:
            what = "models" if by_models else "seeds"
            raise DataError(
                f"{folder}: there are no two {what} of a prompt to compare: it has {len(there)} "
                f"images of {len(models)} models. Generate with "
                f"{'a second model' if by_models else 'more seeds'}, or set compare to "
                f"{'seeds' if by_models else 'models'}"
            )
        what = f"models ({', '.join(models)})" if by_models else "seeds of a model"
        self.summary = f"{folder / MANIFEST}: {what} side by side, the same prompt"
        self.items = [
            Item(
                item_id=f"{sides[0].prompt_id}: "
                + " | ".join(f"{r.model} {r.seed}" for r in sides),
                sides=len(sides),
                models=tuple(row.model for row in sides),
            )
            for sides in self._rows
        ]

    def content(self, number: int) -> Content:
        sides = self._rows[number]
        images = tuple(inside(self._folder, row.file) for row in sides)
        return Content(prompt=sides[0].prompt, images=images)


def _name(sides: Sequence[ManifestRow]) -> str:
    return f"{sides[0].prompt_id}: " + " | ".join(f"{row.model} {row.seed}" for row in sides)


def _grouped(
    rows: Sequence[ManifestRow], key: Callable[[ManifestRow], tuple[str, str]]
) -> Iterator[list[ManifestRow]]:
    found: dict[tuple[str, str], list[ManifestRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return iter(found.values())


def _same_noise(row: ManifestRow) -> tuple[str, str]:
    return row.prompt_id, str(row.seed)


def _same_model(row: ManifestRow) -> tuple[str, str]:
    return row.prompt_id, row.model


class GroupsOfImages(AbstractItems):
    """Groups that start from the same noise, with trajectories, as D3PO trains on."""

    fingerprint = ""

    def __init__(self, folder: Path) -> None:
        """Read the list of a folder.

        Raises:
            DataError: there is none, or no group in it.
        """
        self.folder, self.passed_over = folder, {}
        self.groups = read_groups(folder)
        if not self.groups:
            raise DataError(f"{folder / GROUPS}: there is no group in it; generate some first")
        self.summary = f"{folder / GROUPS}: {len(self.groups)} groups to rank"
        self.items = [Item(item_id=each.group, sides=len(each.images)) for each in self.groups]

    def content(self, number: int) -> Content:
        group = self.groups[number]
        images = tuple(inside(self.folder, name) for name in group.images)
        return Content(prompt=group.prompt, images=images)


class PairsOfImages(AbstractItems):
    """Pairs of a data set, whatever it says of them: ties and pairs without a label too."""

    def __init__(self, config: PairConfig) -> None:
        """Read captions and labels of all rows; of a stream, everything once.

        Raises:
            DataError: no reader understands the data, or its images come alone.
        """
        self._opened = opened = open_data(config)
        columns = opened.columns
        if len(columns.images) < 2:
            raise DataError(
                f"{config.path}: {columns.describe_preference()}: give pairs, such as images of a "
                f"second model next to them"
            )
        self.summary, self.fingerprint = opened.summary, opened.fingerprint
        self._places: dict[str, int | tuple[int, object]] = {}
        passed: Counter[str] = Counter()
        for place, row in self._all_rows(config.limit):
            try:
                if row.problem is not None:
                    passed["malformed row"] += 1
                elif not columns.caption(row):
                    passed["empty caption"] += 1
                elif (name := columns.sample_id(row)) in self._places:
                    passed["the same pair again"] += 1
                else:
                    self._places[name] = place
            except UnusableRowError as error:
                passed[error.reason.value] += 1
        self.passed_over = dict(passed)
        self.items = [Item(item_id=name, sides=2) for name in self._places]
        if not self.items:
            raise DataError(f"{opened.summary}: there is no pair with a caption in it")

    def _all_rows(self, limit: int | None) -> Iterator[tuple[int | tuple[int, object], Row]]:
        rows = self._opened.rows
        found: Iterable[tuple[int | tuple[int, object], Row]]
        if isinstance(rows, AbstractRowStream):
            found = (
                ((part, cursor), row)
                for part in range(len(rows.parts))
                for cursor, row in rows.rows(part)
            )
        else:
            found = enumerate(rows.scan(self._opened.columns.light()))
        for place, each in enumerate(found):
            if limit is not None and place >= limit:
                return
            yield each

    def content(self, number: int) -> Content:
        rows, place = self._opened.rows, self._places[self.items[number].item_id]
        if isinstance(rows, AbstractRowStream):
            assert isinstance(place, tuple)
            part, cursor = place
            _, row = next(rows.rows(part, cursor))  # type: ignore[arg-type]
        else:
            assert isinstance(place, int)
            row = rows[place]
        columns = self._opened.columns
        images = []
        for image, problem in sides_of(row, columns, self._opened.base):
            if problem is not None:
                raise problem
            images.append(image)
        return Content(prompt=columns.caption(row), images=tuple(images))


class PairsOfResponses(AbstractItems):
    """Two responses to one conversation about images, of any form that training reads."""

    shows: ClassVar[Literal["images", "responses"]] = "responses"

    def __init__(self, config: ResponseConfig) -> None:
        """Read the texts of all rows.

        Raises:
            DataError: no form fits the data, or its rows have one response.
        """
        self._opened = opened = open_responses(config, keep_ties=True)
        if not opened.mapping.paired:
            raise DataError(
                f"{config.path}: each row has one response, with nothing to compare it with: give "
                f"rows of two, such as prompt, chosen and rejected"
            )
        self.summary, self.fingerprint = opened.summary, opened.fingerprint
        self._places: dict[str, tuple[int, int]] = {}
        passed: Counter[str] = Counter()
        for number, found in enumerate(opened.without_images()):
            for place, each in enumerate(found):
                if isinstance(each, Skipped):
                    passed[each.reason.value] += 1
                elif isinstance(each, LeftOut):
                    passed[each.value] += 1
                elif each.contexts:
                    passed["responses to different conversations"] += 1
                elif config.limit is None or len(self._places) < config.limit:
                    name = numbered(f"row-{number:08}", place, len(found))
                    self._places[name] = (number, place)
        self.passed_over = dict(passed)
        self.items = [Item(item_id=name, sides=2) for name in self._places]
        if not self.items:
            raise DataError(f"{opened.summary}: there are no two responses to compare in it")

    def content(self, number: int) -> Content:
        pair = self._opened.pair(*self._places[self.items[number].item_id])
        if isinstance(pair, Skipped):
            raise UnusableRowError(pair.reason, pair.detail, pair.side)
        return Content(
            prompt="",
            images=pair.images,
            turns=pair.turns,
            responses=(pair.responses["chosen"], pair.responses["rejected"]),
        )


def open_folder(folder: Path, *, compare: Compare, together: bool) -> AbstractItems:
    """The items of a folder of `diffalign generate`.

    Raises:
        DataError: it has neither list, or nothing to compare; or groups are to be taken apart.
    """
    if (folder / GROUPS).is_file():
        return GroupsOfImages(folder)
    if (folder / MANIFEST).is_file():
        return GeneratedImages(folder, compare=compare, together=together)
    raise DataError(
        f"{folder}: has neither {MANIFEST} nor {GROUPS}, which diffalign generate writes; a data "
        f"set of pairs is given as data.path"
    )
