"""PartiPrompts: short and long prompts by category and by what makes them hard.

A tab-separated table, `PartiPrompts.tsv` of google-research/parti: Prompt, Category, Challenge and
Note. Quotation marks in it are part of the prompts.

Source: Yu et al. 2022, arXiv:2206.10789, section 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign.generation.prompt_sets.base import AbstractPromptSet


@dataclass(frozen=True, kw_only=True)
class PartiPrompts(AbstractPromptSet):
    """1,632 prompts in 12 categories and 11 challenges."""

    columns: ClassVar[frozenset[str]] = frozenset({"prompt", "category", "challenge"})
    size: ClassVar[int] = 1632

    def categories(self, row: Mapping[str, Any], file: Path) -> Mapping[str, str]:
        return {kind: str(row[kind]) for kind in ("category", "challenge")}
