"""The rules of GenEval: whether the objects of an image are those that a prompt asks for.

What surprises in the published rules, and is kept so that figures compare:

- Of each class only as many objects are looked at as are asked for, the surest ones. A third dog
  next to two that are asked for is an error in the task `counting` alone, which excludes it; a blue
  cup is no red one although a red one, less sure, stands next to it.
- In `counting` an object counts above a score of 0.9, elsewhere above 0.3, so a model's score of
  counting is also one of how sure the detector is.
- A direction is taken from the centres, after the distance in each direction has been shortened by
  a tenth of both objects' sizes; what is left is divided by the whole distance and must be more
  than one half. So diagonal neighbours may be both left of and above each other, or neither.
- Overlapping boxes of one class are all counted: `max_overlap` is 1 unless it is set.
- A position whose other object is missing, or has the wrong colour, is wrong.
- The overall score is the mean of the six tasks', not of the images.

Source: evaluate_images.py and summary_scores.py of djghosh13/geneval; Ghosh, Hajishirzi and Schmidt
2023, arXiv:2310.11513.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import DataError
from diffalign.files import numbered_lines, parse_json_line
from diffalign.parsing import shortly
from diffalign.scorers.geneval.detectors.base import Box, Detected

COLOURS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
"""Colours that an object may be asked for, and is told from each other."""
RELATIONS = ("left of", "right of", "above", "below")
MOST_OBJECTS = 16
"""Of each class, the surest ones."""
COUNTING = "counting"
_CLEAR = 0.5
"""Share of the distance that must lie in a direction: within 60 degrees of it."""

ColoursOf = Callable[[Sequence[Detected], str], Sequence[str]]
"""Objects of a class, and its name -> the colour of each."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When what a detector says counts as an object, and a distance as a direction."""

    score: float = 0.3
    counting_score: float = 0.9
    max_overlap: float = 1.0
    """Intersection over union from which the less sure of two objects of a class is the same one;
    1 takes all."""
    position: float = 0.1
    """Share of both objects' sizes by which a distance is shortened."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Objects of one class that an image must show."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None
    """A relation, and the number of the requirement whose objects it is to."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a prompt asks for."""

    prompt: str
    task: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    """Fewer than `count` of each."""

    @property
    def classes(self) -> frozenset[str]:
        """All classes that are named."""
        return frozenset(each.name for each in (*self.include, *self.exclude))


def read_requirements(path: Path) -> dict[str, Requirements]:
    """Requirements by prompt, of a file in the form of `evaluation_metadata.jsonl`.

    Raises:
        DataError: the file is missing, or a line is of another form; it is named.
    """
    found: dict[str, Requirements] = {}
    for number, line in numbered_lines(path, absent="there is no such file"):
        if line.strip():
            each = _requirements(parse_json_line(line, path, number), f"{path}: line {number}")
            found[each.prompt] = each
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return found


def _requirements(row: Any, where: str) -> Requirements:
    if not (isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("tag", "prompt"))):
        raise DataError(f"{where}: must be an object with the texts tag and prompt, and include")
    include = tuple(_wanted(each, where) for each in _objects(row, "include", where))
    for number, each in enumerate(include):
        if each.position is not None and not 0 <= each.position[1] < number:
            raise DataError(
                f"{where}: the position of {each.name} is to object {each.position[1]}, and only "
                f"those before it count ({number})"
            )
    return Requirements(
        prompt=row["prompt"],
        task=row["tag"],
        include=include,
        exclude=tuple(_wanted(each, where) for each in _objects(row, "exclude", where)),
    )


def _objects(row: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list) or (key == "include" and not value):
        raise DataError(f"{where}: {key} must be a list of objects, got {shortly(value)}")
    return value


def _wanted(value: Any, where: str) -> Wanted:
    given = value if isinstance(value, dict) else {}
    name, count, colour = given.get("class"), given.get("count", 1), given.get("color")
    position = given.get("position")
    if not isinstance(name, str) or type(count) is not int or count < 1:
        raise DataError(f"{where}: an object needs a class and a count, got {shortly(value)}")
    if colour is not None and colour not in COLOURS:
        raise DataError(f"{where}: color is one of {', '.join(COLOURS)}, got {shortly(colour)}")
    if position is not None:
        relation, other = position if isinstance(position, list) and len(position) == 2 else ("", 0)
        if relation not in RELATIONS or type(other) is not int:
            raise DataError(
                f"{where}: position is one of {', '.join(RELATIONS)} and the number of an object, "
                f"got {shortly(position)}"
            )
        position = relation, other
    return Wanted(name=name, count=count, colour=colour, position=position)


def kept(
    found: Mapping[str, Sequence[Detected]], task: str, thresholds: Thresholds
) -> dict[str, list[Detected]]:
    """Objects that count, the surest first; classes without any are absent."""
    least = thresholds.counting_score if task == COUNTING else thresholds.score
    result: dict[str, list[Detected]] = {}
    for name, objects in found.items():
        ordered = sorted((o for o in objects if o.score > least), key=lambda o: -o.score)
        chosen: list[Detected] = []
        for each in ordered[:MOST_OBJECTS]:
            if thresholds.max_overlap == 1 or all(
                overlap(other.box, each.box) < thresholds.max_overlap for other in chosen
            ):
                chosen.append(each)
        if chosen:
            result[name] = chosen
    return result


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of boxes, whose last pixels count."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(
        max(first[0], second[0]),
        max(first[1], second[1]),
        min(first[2], second[2]),
        min(first[3], second[3]),
    )
    return shared / (area(*first) + area(*second) - shared)


def relations(box: Box, other: Box, position: float = Thresholds.position) -> frozenset[str]:
    """Where a box lies from another one: none, one or two of `RELATIONS`."""
    corners = np.array([box, other], dtype=float).reshape(2, 2, 2)  # [box, corner, x and y]
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    left = np.maximum(np.abs(offset) - position * sizes, 0) * np.sign(offset)
    if (np.abs(left) < 1e-3).all():
        return frozenset()
    x, y = left / np.linalg.norm(offset)
    holds = (x < -_CLEAR, x > _CLEAR, y < -_CLEAR, y > _CLEAR)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def is_correct(
    wanted: Requirements,
    found: Mapping[str, Sequence[Detected]],
    colours_of: ColoursOf,
    thresholds: Thresholds | None = None,
) -> bool:
    """Whether an image shows what its prompt asks for.

    Args:
        wanted: of the prompt.
        found: all objects that a detector finds, by class.
        colours_of: names the colours of objects.
        thresholds: None takes the published ones.
    """
    thresholds = thresholds or Thresholds()
    objects = kept(found, wanted.task, thresholds)
    matched: list[Sequence[Detected] | None] = []
    for each in wanted.include:
        surest = objects.get(each.name, [])[: each.count]
        right = len(surest) == each.count
        if right and each.colour is not None:
            right = all(colour == each.colour for colour in colours_of(surest, each.name))
        if right and each.position is not None:
            relation, other = each.position
            right = matched[other] is not None and all(
                relation in relations(one.box, target.box, thresholds.position)
                for one in surest
                for target in matched[other] or ()
            )
        matched.append(surest if right else None)
    too_many = any(len(objects.get(each.name, [])) >= each.count for each in wanted.exclude)
    return None not in matched and not too_many
