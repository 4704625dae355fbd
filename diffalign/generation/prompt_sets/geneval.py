"""GenEval: prompts whose objects, counts, colours and positions a detector can check.

JSON lines, `evaluation_metadata.jsonl` of djghosh13/geneval: `tag`, `include`, `exclude`, `prompt`.
The scorer `geneval` reads the same file.

Source: Ghosh, Hajishirzi and Schmidt 2023, arXiv:2310.11513.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign.generation.prompt_sets.base import AbstractPromptSet


@dataclass(frozen=True, kw_only=True)
class GenEvalPrompts(AbstractPromptSet):
    """553 prompts of six tasks; the paper's overall figure is the mean over tasks."""

    columns: ClassVar[frozenset[str]] = frozenset({"tag", "include", "prompt"})
    size: ClassVar[int] = 553

    def categories(self, row: Mapping[str, Any], file: Path) -> Mapping[str, str]:
        return {"task": str(row["tag"])}
