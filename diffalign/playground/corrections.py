"""The mistakes of a description of a scene, sentence by sentence, and the least that fixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.playground.multi_object_scenes import (
    description,
    kind_named,
    kinds_in,
    sentence,
    sentences_of,
)
from diffalign.playground.scenes import Kind, Scene

Fault = Literal["none", "attribute", "absent", "repeated"]


@dataclass(frozen=True)
class CheckedSentence:
    """One sentence of a description, held against the scene."""

    text: str
    fault: Fault
    """`attribute`: an object that the description misses is meant, and one word is wrong.
    `repeated`: an object that is there was named before."""
    correction: Kind | None
    """The kind that the sentence should name; None where it should go."""

    @property
    def corrected(self) -> str:
        """The sentence as it should be; empty where it should go."""
        return sentence(self.correction) if self.correction else ""


def check_sentences(
    response: str, scene: Scene, *, repeats: bool = False
) -> list[CheckedSentence] | None:
    """Hold each sentence of a description against a scene.

    Args:
        response: the description.
        scene: what it is of.
        repeats: judge descriptions that name an object twice as well: the second mention of one
            that is there is a mistake, and goes.

    Returns:
        None where a sentence names no object, or, without `repeats`, an object is named twice: it
        is not for a correction to guess what was meant.
    """
    texts = sentences_of(response)
    named = [kind_named(text) for text in texts]
    kinds = [kind for kind in named if kind is not None]
    if len(kinds) < len(named) or (not repeats and len(set(kinds)) < len(kinds)):
        return None
    missed = [kind for kind in kinds_in(scene) if kind not in kinds]
    checked: list[CheckedSentence] = []
    for place, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind in kinds[:place] and kind in kinds_in(scene):
            checked.append(CheckedSentence(text, "repeated", None))
        else:
            checked.append(_check(text, kind, scene, missed))
    return checked


def _check(text: str, kind: Kind, scene: Scene, missed: list[Kind]) -> CheckedSentence:
    """The verdict on one sentence; an object that it turns out to mean is no longer missed."""
    if kind in kinds_in(scene):
        return CheckedSentence(text, "none", kind)
    alike = [m for m in missed if m.shape == kind.shape] + [
        m for m in missed if m.colour == kind.colour
    ]
    if not alike:
        return CheckedSentence(text, "absent", None)
    missed.remove(alike[0])
    return CheckedSentence(text, "attribute", alike[0])


def hallucinates(sentences: Sequence[CheckedSentence]) -> bool:
    """Whether any sentence is at fault."""
    return any(item.fault != "none" for item in sentences)


def revised(sentences: Sequence[CheckedSentence]) -> str:
    """The description with wrong words replaced and absent objects left out, and nothing added."""
    return description(item.correction for item in sentences if item.correction)
