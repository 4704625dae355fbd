"""How well an image shows the text that its prompt asks for, as a text recogniser reads it.

The wanted text is what the prompt has in quotes. The recogniser is PaddleOCR's, run by rapidocr,
whose wheel holds the models: nothing is downloaded.

Source: Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO), flow_grpo/ocr.py of yifan123/flow_grpo. It
departs from that in three ways: a prompt with several quoted texts asks for all of them, an image
that cannot be read at all is an error and not a score of 0, and a prompt without quotes is refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import digest_of
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer

_PACKAGES = ("rapidocr", "onnxruntime", "rapidfuzz")
_MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
"""rapidocr's name of a stage -> file of its model in the wheel."""


def similarity(found: str, wanted: str, *, only: bool) -> float:
    """One minus the edit distance from the wanted text, as a share of its length.

    Args:
        found: what an image shows.
        wanted: what it should show; not empty.
        only: whether text around the wanted one costs as well.

    Returns:
        From 0 to 1; 0 as soon as there are as many edits as letters in `wanted`.
    """
    from rapidfuzz.distance import Levenshtein  # of an extra; the scorer has looked for it

    if wanted in found and not only:
        return 1.0
    return 1.0 - min(Levenshtein.distance(found, wanted), len(wanted)) / len(wanted)


@dataclass(frozen=True, kw_only=True)
class OCR(AbstractImageScorer):
    """How well an image shows the text that is quoted in its prompt, from 0 to 1."""

    measure: Literal["similarity", "exact"] = "similarity"
    """`similarity` is 1 minus the edit distance over the length of the wanted text, and never below
    0, as in Flow-GRPO; `exact` is 1 where the text is right and 0 elsewhere."""
    only: bool = False
    """Whether any other text in the image counts as wrong. False is Flow-GRPO's: an image that
    shows the wanted text is right whatever stands around it."""
    wanted: str = r'["“]\s*([^"“”]+)["”]'
    """Regular expression of the wanted text in a prompt: its one group, of all matches in order."""
    ignore_case: bool = True
    """Take capitals for small letters."""
    ignore_spaces: bool = True
    """Leave spaces and line breaks out of both texts."""
    lines: Literal["found", "whole"] = "found"
    """`found` has a detector look for lines of text; `whole` takes the image for one line, which
    suits small images of a word, and is faster."""
    enlarge: Annotated[int, AtLeast(1)] = 1
    """Factor by which width and height grow, bicubic, before anything is read."""
    shortest_side: Annotated[int, AtLeast(32)] = 736
    """Of the image that the detector sees, at least, pixels: smaller ones are enlarged for it.
    The default is rapidocr's; time grows with its square."""
    threads: Annotated[int, AtLeast(1)] = 1
    """CPU threads of a reading, up to the number of cores; scores do not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"the scorer ocr needs {' and '.join(missing)}, which is not installed: "
                f"pip install 'diffalign[ocr]'"
            )
        try:
            groups = re.compile(self.wanted).groups
        except re.error as error:
            raise ValueError(
                f"wanted must be a regular expression, got {self.wanted!r}: {error}"
            ) from None
        if groups != 1:
            raise ValueError(
                f"wanted must have one group, which is the wanted text, and {self.wanted!r} has "
                f"{groups}: write (?:...) for those that are not it"
            )

    @cached_property
    def fingerprint(self) -> str:
        settings = [self.measure, "only" if self.only else "", self.wanted, self.lines]
        settings += [str(self.ignore_case), str(self.ignore_spaces), str(self.enlarge)]
        settings += [str(self.shortest_side)] if self.lines == "found" else []
        version = importlib.metadata.version("rapidocr")
        return "-".join(["ocr", version, digest_of(*self._files.values()), *settings])

    def wanted_text(self, prompt: str) -> str:
        """What an image of the prompt should show, without what is ignored.

        Raises:
            ValueError: the prompt asks for no text.
        """
        text = self._plain(" ".join(re.findall(self.wanted, prompt)))
        if not text.strip():
            raise ValueError(
                f"the prompt {prompt!r} asks for no text: the scorer ocr looks for "
                f"{self.wanted}; put the text in quotes, or set scorer.wanted"
            )
        return text

    def read(self, image: Image.Image) -> str:
        """The text that an RGB image shows, line by line; empty where there is none."""
        size = (image.width * self.enlarge, image.height * self.enlarge)
        seen = image if self.enlarge == 1 else image.resize(size, Image.Resampling.BICUBIC)
        found = self._reader(np.ascontiguousarray(np.asarray(seen)[:, :, ::-1]))  # it wants BGR
        return "\n".join(found.txts or ())

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score of each image, shape [n].

        Raises:
            ValueError: a prompt asks for no text.
        """
        wanted = [self.wanted_text(prompt) for prompt in prompts]
        found = [self._plain(self.read(image)) for image in images]
        return torch.tensor([self._compare(*texts) for texts in zip(found, wanted, strict=True)])

    def _compare(self, found: str, wanted: str) -> float:
        if self.measure == "exact":
            return float(found == wanted or (wanted in found and not self.only))
        return similarity(found, wanted, only=self.only)

    def _plain(self, text: str) -> str:
        text = ("" if self.ignore_spaces else " ").join(text.split())
        return text.casefold() if self.ignore_case else text

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The models by rapidocr's name of their stage."""
        spec = importlib.util.find_spec("rapidocr")
        assert spec is not None and spec.origin is not None  # __post_init__ has looked for it
        folder = Path(spec.origin).parent / "models"
        absent = [name for name in _MODELS.values() if not (folder / name).is_file()]
        if absent:
            raise ModelError(
                f"{folder} does not hold {' and '.join(absent)}, which the wheel of rapidocr 3.10 "
                f"brings: pip install 'diffalign[ocr]' anew"
            )
        return {stage: folder / name for stage, name in _MODELS.items()}

    @cached_property
    def _reader(self) -> Any:
        from rapidocr import RapidOCR  # of an extra; __post_init__ has looked for it

        threads = min(self.threads, os.cpu_count() or 1)  # it takes a larger number for all cores
        settings = {
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # whatever was read counts, as in Flow-GRPO
            "Global.use_cls": False,
            "Global.use_det": self.lines == "found",
            "Det.limit_side_len": self.shortest_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": threads,
        }
        paths = {f"{stage}.model_path": str(path) for stage, path in self._files.items()}
        return RapidOCR(params={**settings, **paths})
