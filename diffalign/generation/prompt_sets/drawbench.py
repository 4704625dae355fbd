"""DrawBench: prompts that probe colours, counting, text, positions and rare words.

A comma-separated table with the columns Prompts and Category, as it is exported from the sheet of
the authors.

Source: Saharia et al. 2022, arXiv:2205.11487, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign.generation.prompt_sets.base import AbstractPromptSet


@dataclass(frozen=True, kw_only=True)
class DrawBench(AbstractPromptSet):
    """200 prompts in 11 categories."""

    columns: ClassVar[frozenset[str]] = frozenset({"prompts", "category"})
    size: ClassVar[int] = 200

    def categories(self, row: Mapping[str, Any], file: Path) -> Mapping[str, str]:
        return {"category": str(row["category"])}
