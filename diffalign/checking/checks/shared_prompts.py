"""Prompts, or images of responses, that held-out data has as well."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, counted
from diffalign.checking.rows import Examined, OtherData, SeenAt


@dataclass(frozen=True, kw_only=True)
class SharedPrompts(AbstractCheck):
    """What is trained on and held out at once: prompts that differ in nothing but case, blanks and
    punctuation at their ends; of responses about images, the images."""

    title: ClassVar[str] = "Shared with held-out data"

    def look(self, data: Examined) -> Outcome:
        if not data.others:
            return Outcome(
                passed_over="there is no other split, holdout or against to compare with"
            )
        findings, figures = [], {}
        for other in data.others:
            shared: dict[str | bytes, list[int]] = defaultdict(list)
            for number, key in enumerate(data.keys):
                if key is not None and key in other.keys and number not in other.own:
                    shared[key].append(number)
            figures[f"shared with {other.name}"] = len(shared)
            if shared:
                findings.append(self._finding(data, other, list(shared.values())))
        return Outcome(figures=figures, findings=findings)

    @staticmethod
    def _finding(data: Examined, other: OtherData, groups: list[list[int]]) -> Finding:
        of_images = any(isinstance(data.keys[rows[0]], bytes) for rows in groups)
        noun = "images" if of_images else "prompts"
        rows = [number for group in groups for number in group]
        return Finding(
            name="shared_prompts",
            severity="harmful",
            count=len(groups),
            what=f"{counted(len(groups), noun)} of {counted(len(rows), 'rows')} "
            f"{'is' if len(groups) == 1 else 'are'} in {other.name} as well",
            harm="what is measured there was trained on, and looks better than it is",
            advice="take them out of one of the two",
            rows=[data.rows[number].name for number in rows],
            examples=[
                [SeenAt(group[0], side) for side in data.rows[group[0]].images] for group in groups
            ],
        )
