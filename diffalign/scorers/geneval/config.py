"""GenEval as a scorer: 1 where an image shows the objects that its prompt asks for, 0 where not.

`compare` reports it by task, and the overall score of the paper is there the mean of categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.config import MAY_CHANGE, MUST_STAY
from diffalign.errors import ConfigError
from diffalign.models.preference.clip_loading import digest_of
from diffalign.ranges import Between
from diffalign.scorers.clip import CLIPScore
from diffalign.scorers.geneval.detectors.base import AbstractDetector, Detected
from diffalign.scorers.geneval.rules import (
    COLOURS,
    Requirements,
    Thresholds,
    is_correct,
    read_requirements,
)
from diffalign.scorers.images import AbstractImageScorer

_BACKGROUND = (153, 153, 153)
"""Behind an object whose colour is asked for."""
_PHRASES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


@dataclass(frozen=True, kw_only=True)
class GenEval(AbstractImageScorer):
    """Whether objects, counts, colours and positions are those of the prompt: 1 or 0."""

    metadata: Path = field(metadata=MAY_CHANGE)
    """What each prompt asks for: `evaluation_metadata.jsonl` of GenEval, or a file of that form."""
    detector: AbstractDetector
    """What finds objects: `kind: mask2former`, detr, or diffalign.playground.detector."""
    colours: str = field(default="timm/vit_large_patch14_clip_224.openai", metadata=MUST_STAY)
    """The CLIP that tells colours, a folder or hub id in the layout of open_clip; not read where
    the detector knows them."""
    least_score: Annotated[float, Between(0, 1)] = Thresholds.score
    """From which score on an object counts."""
    counting_score: Annotated[float, Between(0, 1)] = Thresholds.counting_score
    """The same in the task counting."""
    max_overlap: Annotated[float, Between(0, 1)] = Thresholds.max_overlap
    """Overlap from which two objects of one class are the same one; 1 takes all, as published."""

    @cached_property
    def fingerprint(self) -> str:
        thresholds = f"{self.least_score:g}-{self.counting_score:g}-{self.max_overlap:g}"
        colours = "" if self.detector.knows_colours else f"-{self._clip.fingerprint}"
        asked = digest_of(self.metadata)
        return f"geneval-1-{asked}-{self.detector.fingerprint}{colours}-{thresholds}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """1 or 0 of each image, shape [n].

        Raises:
            ValueError: a prompt is not in the file.
            ConfigError: a class of the file is none that the detector finds.
        """
        wanted = [self._of_prompt(prompt) for prompt in prompts]
        found = self.detector.detect(images)
        thresholds = Thresholds(
            score=self.least_score,
            counting_score=self.counting_score,
            max_overlap=self.max_overlap,
        )
        scores = []
        for image, each, objects in zip(images, wanted, found, strict=True):

            def colours_of(
                chosen: Sequence[Detected], name: str, image: Image.Image = image
            ) -> Sequence[str]:
                return self._colours_of(image, chosen, name)

            scores.append(float(is_correct(each, objects, colours_of, thresholds)))
        return torch.tensor(scores)

    def to(self, device: torch.device | str) -> GenEval:
        self.detector.to(device)
        if not self.detector.knows_colours:
            self._clip.to(device)
        return self

    def _of_prompt(self, prompt: str) -> Requirements:
        if prompt not in self._requirements:
            raise ValueError(
                f"{self.metadata} does not say what {prompt[:60]!r} asks for: score images of its "
                f"prompts, or name the file that has them"
            )
        return self._requirements[prompt]

    @cached_property
    def _requirements(self) -> dict[str, Requirements]:
        found = read_requirements(self.metadata)
        unknown = sorted({n for each in found.values() for n in each.classes - self._classes})
        if unknown:
            raise ConfigError(
                f"{self.metadata} asks for objects that the detector does not find: "
                f"{', '.join(unknown[:5])} (it finds {', '.join(sorted(self._classes)[:8])}, ...)"
            )
        return found

    @cached_property
    def _classes(self) -> frozenset[str]:
        return self.detector.classes

    def _colours_of(
        self, image: Image.Image, objects: Sequence[Detected], name: str
    ) -> Sequence[str]:
        if self.detector.knows_colours:
            return [each.colour or "" for each in objects]
        seen = self._clip.features([_cut_out(image, each) for each in objects])
        return [COLOURS[place] for place in (seen @ self._texts(name).T).argmax(dim=1).tolist()]

    def _texts(self, name: str) -> Tensor:
        """Directions of the colours of a class, shape [colours, d]: the mean over phrases."""
        if name not in self._known_texts:
            phrases = [p.format(c=colour, name=name) for colour in COLOURS for p in _PHRASES]
            by_colour = self._clip.text_features(phrases).unflatten(0, (len(COLOURS), -1))
            self._known_texts[name] = normalize(by_colour.mean(dim=1), dim=-1)
        return self._known_texts[name]

    @cached_property
    def _known_texts(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _clip(self) -> CLIPScore:
        return CLIPScore(path=self.colours)


def _cut_out(image: Image.Image, each: Detected) -> Image.Image:
    """The object alone, on grey, cut to its box."""
    if each.mask is not None:
        blank = Image.new("RGB", image.size, _BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(each.mask.astype(np.uint8) * 255))
    left, top, right, bottom = each.box
    return image.crop(
        (int(left), int(top), max(int(right), int(left) + 1), max(int(bottom), int(top) + 1))
    )
