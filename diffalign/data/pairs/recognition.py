"""The mapping that a data set of images fits: two images a row, or several."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product

from diffalign.data.pairs.columns import PairColumns, smaller_wins
from diffalign.data.pairs.groups import GroupColumns, column_of
from diffalign.data.pairs.known_columns import PROMPT_NAMES, find_columns, general_columns
from diffalign.data.rows import Schema
from diffalign.errors import DataError, did_you_mean

_LISTS_OF_IMAGES = (
    "images",
    "image",
    "image_paths",
    "image_path",
    "file_paths",
    "file_path",
    "image_files",
    "jpgs",
    "pngs",
    "pictures",
)
_LISTS_OF_SCORES = (
    "ranks",
    "rank",
    "scores",
    "score",
    "labels",
    "label",
    "human_preference",
    "preferences",
    "preference",
    "votes",
    "ratings",
    "rating",
    "rewards",
    "reward",
    "overall_rating",
)
"""In this order: ImageRewardDB has ranks, and ratings that they come from."""

_FIELDS_OF_IMAGES = ("image", "image_path", "file_path", "path", "file", "jpg", "bytes")

_NUMBERED_IMAGES = ("image", "img", "jpg", "png", "picture", "path", "image_path", "file")
_SEPARATORS = ("_", "", "-")
_NUMBERED_SCORES = (
    "rank{sep}{number}",
    "score{sep}{number}",
    "label{sep}{number}",
    "votes{sep}{number}",
    "rating{sep}{number}",
    "reward{sep}{number}",
    "preference{sep}{number}",
    "{image}{sep}{number}_rank",
    "{image}{sep}{number}_score",
    "rank_{image}{sep}{number}",
    "score_{image}{sep}{number}",
    "votes_{image}{sep}{number}",
    "weighted_results_{image}{sep}{number}_preference",
)
"""Of the image with the same number."""


def recognise(
    configured: Mapping[str, str],
    schema: Schema,
    *,
    lower_is_better: bool | None,
    pickapic: bool = False,
) -> PairColumns | GroupColumns | None:
    """The mapping under `data.columns`, or else the first one known that a data set fits.

    Args:
        configured: `data.columns`.
        schema: of the data set.
        lower_is_better: whether the smaller number wins; None goes by the names of the columns.
        pickapic: whether Pick-a-Pic's columns are looked for, too.

    Raises:
        DataError: `data.columns` is incomplete or names a column that does not exist, or there is
            an image that nobody has labelled.
    """
    if set(configured) == {"prompt", "images", "scores"}:
        return _configured_groups(configured, schema, lower_is_better)
    groups = None if configured else found_groups(schema, lower_is_better)
    if groups is not None:
        return groups
    find = find_columns if pickapic else general_columns
    names = [name for name in schema.names if configured or name not in schema.lists]
    columns = find(configured, names, lower_is_better=lower_is_better)
    if columns is not None and not configured:
        refuse_left_out(columns, schema.names)
    return columns


def _configured_groups(
    configured: Mapping[str, str], schema: Schema, lower_is_better: bool | None
) -> GroupColumns:
    parts = {key: tuple(map(str.strip, name.split(","))) for key, name in configured.items()}
    for key, names in parts.items():
        for name in names:
            if column_of(name) not in schema.names:
                raise DataError(
                    f"data.columns.{key} names {name}, and the data set has "
                    f"{', '.join(schema.names)}.{did_you_mean(name, schema.names)}"
                )
    counts = {key: len(parts[key]) for key in ("images", "scores")}
    if min(counts.values()) > 1 and counts["images"] != counts["scores"]:
        raise DataError(
            f"data.columns names {counts['images']} columns of images and {counts['scores']} of "
            "scores: give one score for each image"
        )
    return GroupColumns(
        prompt=configured["prompt"],
        images=parts["images"],
        scores=parts["scores"],
        lower_is_better=smaller_wins(parts["scores"], lower_is_better),
    )


def found_groups(schema: Schema, lower_is_better: bool | None) -> GroupColumns | None:
    """The mapping of several images a row that a data set fits; None where it fits none.

    Args:
        schema: of the data set.
        lower_is_better: whether the smaller number wins; None goes by the names of the columns.
    """
    prompt = next((name for name in PROMPT_NAMES if name in schema.names), None)
    if prompt is None:
        return None
    if {"chosen", "rejected"} <= set(schema.names) and {"chosen", "rejected"} & schema.lists:
        return GroupColumns(prompt=prompt, images=("chosen", "rejected"))
    objects = _of_objects(schema, lower_is_better, prompt)
    if objects is not None:
        return objects
    scores: _Names | None = next(((n,) for n in _LISTS_OF_SCORES if n in schema.lists), None)
    images: _Names | None = next(((n,) for n in _LISTS_OF_IMAGES if n in schema.lists), None)
    numbered = _numbered(schema, scores) if images is None or scores is None else None
    if numbered is not None:
        images, scores = numbered
    if images is None or scores is None:
        return None
    lower = smaller_wins(scores, lower_is_better)
    return GroupColumns(prompt=prompt, images=images, scores=scores, lower_is_better=lower)


_Names = tuple[str, ...]


def _of_objects(schema: Schema, lower_is_better: bool | None, prompt: str) -> GroupColumns | None:
    """One list of objects, each with an image and its number."""
    for name, fields in schema.objects.items():
        image = next((f for f in _FIELDS_OF_IMAGES if f in fields), None)
        score = next((f for f in _LISTS_OF_SCORES if f in fields), None)
        if image is not None and score is not None:
            lower = smaller_wins([score], lower_is_better)
            return GroupColumns(
                prompt=prompt,
                images=(f"{name}.{image}",),
                scores=(f"{name}.{score}",),
                lower_is_better=lower,
            )
    return None


def _numbered(schema: Schema, listed_scores: _Names | None) -> tuple[_Names, _Names] | None:
    """More than two numbered columns of images, and those of their numbers or the one list."""
    for stem, separator in product(_NUMBERED_IMAGES, _SEPARATORS):
        images = _members(f"{stem}{separator}", schema.names)
        if len(images) < 3:
            continue
        if listed_scores is not None:
            return tuple(images.values()), listed_scores
        for template in _NUMBERED_SCORES:
            scores = tuple(
                template.format(image=stem, sep=separator, number=number) for number in images
            )
            if set(scores) <= set(schema.names):
                return tuple(images.values()), scores
    return None


def _members(start: str, names: Collection[str]) -> dict[str, str]:
    """Number -> column of that start, in the order of the numbers."""
    found = {
        name.removeprefix(start): name
        for name in names
        if name.startswith(start) and name.removeprefix(start).isdecimal()
    }
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def refuse_left_out(columns: PairColumns, names: Collection[str]) -> None:
    """Raise DataError where a pair of numbered images has a third one next to it.

    Args:
        columns: a mapping that was recognised, not one that a config names.
        names: of all columns.
    """
    if len(columns.images) == 1:
        _refuse_one_image_of_a_ranking(columns, names)
    if columns.images == ("chosen",):
        others = [name for name in names if name.startswith("rejected")]
        if others:
            raise DataError(
                f"{columns.describe()}; and {', '.join(others)} would be left out. Put them into a "
                "list rejected, or name the two images to be read under data.columns"
            )
    if len(columns.images) < 2:
        return
    stems = {name.rstrip("0123456789") for name in columns.images}
    others = [
        name
        for stem in stems
        for name in _members(stem, names).values()
        if name not in columns.images
    ]
    if len(stems) == 1 and others:
        raise DataError(
            f"{columns.describe()}; and {', '.join(others)} would be left out. Give every image a "
            "number of its own, as a column next to it or in a list, or name the two images to be "
            "read under data.columns"
        )


_VERDICTS = frozenset({"label", "kto_tag", "preferred", "is_preferred", "is_chosen", "desirable"})
"""Columns that may say of one image that it is not a preferred one."""


def _refuse_one_image_of_a_ranking(columns: PairColumns, names: Collection[str]) -> None:
    """Raise DataError where rows of one image each make up a ranking, as ImageRewardDB has them, or
    are labelled as preferred or not."""
    ranked = [name for name in names if smaller_wins([name], None)]
    grouped = [name for name in ("prompt_id", "group_id") if name in names]
    scored = [name for name in _LISTS_OF_SCORES if name in names]
    labelled = [name for name in names if columns.images == ("image",) and name in _VERDICTS]
    if ranked or labelled or (grouped and scored):
        left_out = ", ".join(dict.fromkeys([*grouped, *ranked, *labelled, *scored]))
        raise DataError(
            f"{columns.describe()}; and {left_out} would be left out. Put the images of a prompt "
            "into one row, as lists images and rank (or scores); or, to take every image as a "
            f"preferred one, name {columns.prompt} and {columns.images[0]} as prompt and chosen "
            "under data.columns"
        )
