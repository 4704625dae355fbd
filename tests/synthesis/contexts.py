"""A tiny model with a few questions about random images, ready to make something of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from diffalign.data.responses.questions import Question, Unmade
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.generation.writing import Writer
from diffalign.models.vlm.config import VLM
from diffalign.synthesis.base import AbstractSynthesis, Context, ImageStore, Made
from tests.responses import random_image
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_vl

_FAMILIES = {"llava": tiny_llava, "llava_next": tiny_llava_next, "qwen2_vl": tiny_qwen2_vl}
RESPONSES = (
    "A red cat sits here. It is big and old.",
    "Yes, there is a dog. It runs.",
    "two cats and a table",
    "The table is on a mat.",
)


@cache
def folder(family: str) -> Path:
    """Of a tiny model."""
    return _FAMILIES[family](Path(mkdtemp()))


@cache
def model(family: str = "llava") -> Any:
    """The same one, loaded."""
    loaded = VLM(path=str(folder(family))).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    loaded.network.requires_grad_(False)
    return loaded


def writer(family: str = "llava", *, batch_size: int = 4) -> Writer:
    return Writer(model(family), batch_size=batch_size)


def question(number: int, root: Path, *, response: str | None = None) -> Question:
    """One about an image of its own, which lies in a file."""
    path = root / f"{number}.png"
    if not path.exists():
        random_image(number, size=(20 + 4 * number, 16)).save(path)
    return Question(
        sample_id=f"row-{number}",
        images=(path,),
        turns=(Turn(role="user", text=f"{IMAGE}\nWhat is it?"),),
        response=RESPONSES[number % len(RESPONSES)] if response is None else response,
    )


def context(
    root: Path, questions: Sequence[Any], *, family: str = "llava", batch_size: int = 4
) -> Context:
    return Context(
        writer=writer(family, batch_size=batch_size),
        questions=questions,
        images=ImageStore(root),
        folder=root,
        seed=0,
        max_pixels=10**6,
    )


def make(
    method: AbstractSynthesis, root: Path, *, count: int = 4, **settings: Any
) -> list[Made | Unmade]:
    """What a method makes of a few questions at once."""
    questions = [question(number, root) for number in range(count)]
    return method.open(context(root, questions, **settings))(questions)
