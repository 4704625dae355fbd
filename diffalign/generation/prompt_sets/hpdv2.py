"""The benchmark of HPSv2: prompts of four styles, each a JSON list of texts in a file of its own.

`anime.json`, `concept-art.json`, `paintings.json` and `photo.json`; give their folder, or one of
them.

Source: Wu et al. 2023, arXiv:2306.09341, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign.generation.prompt_sets.base import AbstractPromptSet


@dataclass(frozen=True, kw_only=True)
class HPDv2(AbstractPromptSet):
    """3,200 prompts, 800 of each style."""

    columns: ClassVar[frozenset[str]] = frozenset()
    size: ClassVar[int] = 3200
    files: ClassVar[tuple[str, ...]] = (
        "anime.json",
        "concept-art.json",
        "paintings.json",
        "photo.json",
    )

    def categories(self, row: Mapping[str, Any], file: Path) -> Mapping[str, str]:
        return {"style": file.stem}
