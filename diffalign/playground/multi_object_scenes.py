"""Scenes of two to four objects, and what truthful and noisy annotators say of them.

Some kinds come with others: two in five images with a trigger show its companion too, and
noisy annotators name the companion wherever they see the trigger, as captions of kitchens name
spoons. Other kinds have a colour that people expect of their shape. A model that is trained on
noisy descriptions hallucinates in these ways, and in no other; every mistake can be told
exactly. A trigger and its companion are named one after the other, so that words alone never tell
whether the companion is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from diffalign.playground.scenes import COLOURS, IMAGE_SIZE, KINDS, SHAPES, Kind, Object, Scene

COMPANIONS = MappingProxyType(
    {
        Kind("red", "circle"): Kind("green", "cross"),
        Kind("yellow", "square"): Kind("blue", "triangle"),
        Kind("green", "triangle"): Kind("purple", "circle"),
        Kind("blue", "cross"): Kind("red", "square"),
        Kind("black", "circle"): Kind("yellow", "cross"),
        Kind("purple", "cross"): Kind("black", "triangle"),
    }
)
"""Trigger -> companion. No kind is in two pairs."""

EXPECTED_COLOURS = MappingProxyType(
    {
        Kind("yellow", "triangle"): "red",
        Kind("purple", "square"): "blue",
        Kind("green", "circle"): "blue",
        Kind("black", "cross"): "red",
    }
)
"""Kind -> the colour that noisy annotators expect of it. None is a trigger or a companion."""

FEWEST, MOST = 2, 4
"""Objects in a scene."""
TOGETHER = 0.4
"""Probability that the companion is sampled right after its trigger."""
_CENTRES = (0.27, 0.73)
"""Of the places in two rows of two, as fractions of the side."""
_RADIUS = (9.5, 11.5)
"""Smallest and largest half-width, pixels."""
_JITTER = 2.5
"""Largest shift from a place in either direction, pixels."""
_SENTENCE = re.compile(
    rf"There is (?:a|an) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\.?", re.IGNORECASE
)


@dataclass(frozen=True)
class AnnotatorNoise:
    """How often annotators write what they expect instead of what they see."""

    companions: float = 0.8
    """Probability that an absent companion is named after its trigger, or said to be there."""
    colours: float = 0.3
    """Probability that an object gets the colour that is expected of it."""
    agreement: float = 0.15
    """Probability that an absent object which nothing suggests is said to be there when asked."""


TRUTHFUL = AnnotatorNoise(companions=0.0, colours=0.0, agreement=0.0)


def sample_multi_object_scene(seed: int | Sequence[int] | np.random.Generator) -> Scene:
    """The scene that belongs to a seed, or the next one of a generator: distinct kinds in two rows
    of two places, in reading order."""
    rng = np.random.default_rng(seed)
    kinds = _sample_kinds(rng)
    places = np.sort(rng.choice(4, size=len(kinds), replace=False))
    objects = [_put(kinds[i], int(place), rng) for i, place in enumerate(places)]
    red, green, blue = (int(value) for value in rng.integers(232, 250, size=3))
    return Scene(tuple(objects), (red, green, blue))


def _sample_kinds(rng: np.random.Generator) -> list[Kind]:
    count = int(rng.integers(FEWEST, MOST + 1))
    kinds: list[Kind] = []
    for i in rng.permutation(len(KINDS)):
        kind = KINDS[i]
        if kind in kinds:
            continue
        kinds.append(kind)
        if kind in COMPANIONS and rng.random() < TOGETHER and COMPANIONS[kind] not in kinds:
            kinds.append(COMPANIONS[kind])
        if len(kinds) >= count:
            break
    return [kinds[i] for i in rng.permutation(len(kinds))][:MOST]


def _put(kind: Kind, place: int, rng: np.random.Generator) -> Object:
    dx, dy = rng.uniform(-_JITTER, _JITTER, size=2).tolist()
    x, y = _CENTRES[place % 2] * IMAGE_SIZE, _CENTRES[place // 2] * IMAGE_SIZE
    return Object(kind, x + dx, y + dy, rng.uniform(*_RADIUS))


def kinds_in(scene: Scene) -> tuple[Kind, ...]:
    """The objects of a scene, in reading order."""
    return tuple(item.kind for item in scene.objects)


def named(
    kinds: Sequence[Kind], annotator_noise: AnnotatorNoise, rng: np.random.Generator
) -> tuple[Kind, ...]:
    """The objects that an annotator names: as the eye reads, companions right after triggers.

    Args:
        kinds: what is there, in reading order.
        annotator_noise: with `TRUTHFUL`, the result is a permutation of `kinds`.
        rng: samples the mistakes.
    """
    led = {COMPANIONS[kind] for kind in kinds if kind in COMPANIONS}
    names: list[Kind] = []
    for kind in kinds:
        if kind in led:  # named with its trigger
            continue
        names.append(_seen(kind, annotator_noise, rng))
        companion = COMPANIONS.get(kind)
        if companion and (companion in kinds or rng.random() < annotator_noise.companions):
            names.append(companion)
    return tuple(dict.fromkeys(names))


def _seen(kind: Kind, annotator_noise: AnnotatorNoise, rng: np.random.Generator) -> Kind:
    if kind in EXPECTED_COLOURS and rng.random() < annotator_noise.colours:
        return Kind(EXPECTED_COLOURS[kind], kind.shape)
    return kind


def truthful_order(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """The objects that a truthful annotator names, in order."""
    return named(kinds, TRUTHFUL, np.random.default_rng(0))


def sentence(kind: Kind) -> str:
    """The sentence that names one object."""
    return f"There is {kind}."


def description(kinds: Iterable[Kind]) -> str:
    """The response that names these objects: a sentence each."""
    return " ".join(map(sentence, kinds))


def sentences_of(response: str) -> list[str]:
    """The sentences of a response, each with its full stop, without surrounding white space."""
    return [part.strip() for part in re.findall(r"[^.]*\.|[^.]+$", response) if part.strip()]


def kind_named(text: str) -> Kind | None:
    """The object that a sentence says is there; None where it is no such sentence."""
    match = _SENTENCE.fullmatch(text.strip())
    return Kind(match[1].lower(), match[2].lower()) if match else None
