"""A stand-in for a vision-language model that says whether an image is bright."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffalign.models.base import AbstractModel

ASKED: list[str] = []
"""What any of them was asked, in order."""


@dataclass(frozen=True, kw_only=True)
class BrightnessTeller(AbstractModel):
    """Says `a light` of bright images and `no light` of others."""

    level: int = 128
    """Mean value above which an image is bright."""
    mute: bool = False
    """Load a model that cannot write."""

    @property
    def trains_adapter(self) -> bool:
        return False

    def describe(self) -> str:
        return "a brightness teller"

    @property
    def library(self) -> str:
        return "none"

    def usage(self, folder: str) -> str:
        return ""

    def next_step(self, run: Path) -> str:
        return ""

    def check(self) -> None:
        pass

    def load(self, **_: Any) -> Any:
        if self.mute:
            return SimpleNamespace()
        return SimpleNamespace(
            processor=SimpleNamespace(apply_chat_template=_render), generate=self._generate
        )

    def _generate(
        self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, max_new_tokens: int
    ) -> list[str]:
        ASKED.extend(prompts)
        bright = [np.asarray(image).mean() > self.level for (image,) in images]
        return ["a light" if is_bright else "no light" for is_bright in bright]


def _render(messages: list[dict[str, Any]], **_: Any) -> str:
    *before, question = messages
    system = [f"{message['role']}: {message['content'][0]['text']} " for message in before]
    return "".join(system) + str(question["content"][1]["text"])
