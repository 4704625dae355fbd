"""Processors of the tiny vision-language models, loaded once, and short names for their input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.records import ResponsePair, Turn
from tests.layouts import encoded, solid_image
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_vl

WRITERS: dict[str, Callable[..., Path]] = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
}
FAMILIES = list(WRITERS)


@functools.cache
def loaded(family: str) -> tuple[Any, Any]:
    """(model, processor); shared, so not to be changed."""
    with TemporaryDirectory() as folder:
        path = WRITERS[family](Path(folder))
        return AutoModelForImageTextToText.from_pretrained(path).eval(), processor(path)


def processor(path: Path) -> Any:
    return AutoProcessor.from_pretrained(path)


@functools.cache
def encoder(family: str, max_length: int | None = None) -> ChatEncoder:
    return ChatEncoder(loaded(family)[1], max_length)


def user(text: str) -> tuple[Turn, ...]:
    return (Turn(role="user", text=text),)


def response_pair(**changes: Any) -> ResponsePair:
    """A red image, one question, two responses."""
    fields = {
        "sample_id": "s",
        "images": (encoded(solid_image((200, 0, 0), size=(20, 12))),),
        "turns": user("<image>\nWhat is it?"),
        "responses": {"chosen": "a red cat", "rejected": "a blue dog, I think"},
        **changes,
    }
    return ResponsePair(**fields)
