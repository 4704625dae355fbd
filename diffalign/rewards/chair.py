"""CHAIR as a reward: descriptions that name what their image shows, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

from diffalign.config import MAY_CHANGE
from diffalign.data.responses.coco import KnownIds
from diffalign.data.responses.questions import Question
from diffalign.ranges import AtLeast
from diffalign.response_rules.coco_objects import ObjectWords, read_image_objects, read_synonyms
from diffalign.response_rules.mentions import Repeated, truthfulness
from diffalign.response_rules.words import (
    SingulariserName,
    TokeniserName,
    singulariser,
    tokeniser,
)
from diffalign.rewards.base import AbstractReward


@dataclass(frozen=True, kw_only=True)
class Chair(AbstractReward):
    """The share of the mentioned objects that are there, and the share of those there that are
    mentioned: see `response_rules.mentions.truthfulness`."""

    synonyms: Path = field(metadata=MAY_CHANGE)
    """The published table of classes, `synonyms.txt` of LisaAnne/Hallucination."""
    objects: Path = field(metadata=MAY_CHANGE)
    """`{image_id: [class, ...]}`, as `diffalign evaluate chair` reads it; an image is known by the
    name of its file or the number in it."""
    recall: Annotated[float, AtLeast(0)] = 1.0
    """How much naming what is there counts, next to naming nothing else. At 0 the best description
    is an empty one. Ours."""
    repeated: Repeated = "once"
    """What a second mention of a class counts for: nothing, or `wrong`, like an object that is not
    there."""
    tokeniser: TokeniserName = "rules"
    """How descriptions are cut into words."""
    singulariser: SingulariserName = "rules"
    """How words become singulars."""

    def check(self) -> None:
        assert self._truth and self._words  # both are read

    @property
    def fingerprint(self) -> str:
        content = self.synonyms.read_bytes() + self.objects.read_bytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def obstacle(self, question: Question) -> str | None:
        if len(question.images) != 1:
            return f"it is about {len(question.images)} images, and descriptions are of one"
        image = question.images[0]
        if not isinstance(image, Path):
            return "its image lies in the table of questions and has no name to know it by"
        if self._ids.find(image.stem) is None:
            return f"{self.objects} has no {image.stem} (it has {self._ids.examples()})"
        return None

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        image = question.images[0]
        assert isinstance(image, Path), "there was no obstacle"
        known = self._ids.find(image.stem)
        assert known is not None, "there was no obstacle"
        truth = self._truth[known]
        return [
            truthfulness(self._words(text), truth, recall=self.recall, repeated=self.repeated)
            for text in responses
        ]

    @cached_property
    def _words(self) -> ObjectWords:
        return ObjectWords(
            synonyms=read_synonyms(self.synonyms),
            tokenise=tokeniser(self.tokeniser),
            singularise=singulariser(self.singulariser),
        )

    @cached_property
    def _truth(self) -> Mapping[str, frozenset[str]]:
        return read_image_objects(self.objects, self._words.synonyms)

    @cached_property
    def _ids(self) -> KnownIds:
        return KnownIds(self._truth)
