"""Benchmarks of closed questions about images: yes or no, or one of several letters.

What they share: responses are read from a file or asked of a model, each question once, and counts
come by image. How a response is read and what is counted is the benchmark's own, in its `rules.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.errors import DataError
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ask, check_one_source
from diffalign.models.base import AbstractModel


@dataclass(frozen=True, kw_only=True)
class ClosedQuestion:
    """What a model is asked, and under which name its response is kept."""

    question_id: str
    """Distinct within the benchmark."""
    image: Path | None
    """Below the folder of images, under its published name; None where no image is shown."""
    text: str
    """Without a suffix."""
    choices: tuple[str, ...] = ()
    """The words of which the most probable one is taken; empty where the model writes freely."""


@dataclass(frozen=True, kw_only=True)
class AbstractClosedQuestions(AbstractBenchmark):
    """Settings of a benchmark of closed questions: where responses come from."""

    responses: Path | None = None
    """Saved responses in the benchmark's published layout; null asks the model."""
    model: AbstractModel | None = None
    """The model to ask where there are no saved responses."""
    asking: Asking | None = None
    """How it is asked."""
    suffix: str = ""
    """Text after each question when a model is asked; empty leaves questions as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_source(self.responses, self.model, self.asking, name="responses")

    @property
    def kept(self) -> tuple[Path, ...]:
        return () if self.asking is None else (self.asking.saves,)

    @abc.abstractmethod
    def to_ask(self) -> Sequence[ClosedQuestion]:
        """The questions, in their order.

        Raises:
            DataError: a file cannot be used.
        """

    def asked(self) -> Asked | None:
        if self.responses is not None:
            return None
        assert self.asking is not None  # __post_init__ checked
        questions = [
            ImageQuestion(
                question_id=question.question_id,
                image=None if question.image is None else self.asking.images / question.image,
                text=question.text + self.suffix,
                choices=question.choices,
            )
            for question in self.to_ask()
        ]
        return Asked(model=self.model, questions=questions, asking=self.asking)

    def check_questions(self, questions: Path | None) -> None:
        """Raise ValueError unless questions are given where a model is asked, and nowhere else.

        Args:
            questions: of a benchmark whose saved responses hold their questions.
        """
        if (questions is None) == (self.responses is None):
            raise ValueError(
                "questions and model go together: saved responses hold their questions themselves"
            )

    def ask_model(self) -> dict[str, str]:
        """The model's responses by question id; what is missing is asked here."""
        asked = self.asked()
        assert asked is not None, "responses are saved ones"
        return ask(asked.model, asked.questions, asked.asking)

    @property
    def figures_depend_on(self) -> Mapping[str, Any]:
        """The settings of asking that shape figures, for a report."""
        return {
            **({"suffix": self.suffix} if self.suffix else {}),
            **(self.asking.figures_depend_on if self.asking else {}),
        }


def in_a_folder(folder: Path, names: Sequence[str]) -> Path:
    """The first of several names that is there, else the first of all.

    Args:
        folder: of the images.
        names: paths below it.
    """
    return next((Path(n) for n in names if (folder / n).is_file()), Path(names[0]))


def refuse_unanswered(unanswered: Sequence[str], count: int, path: Path) -> None:
    """Raise DataError where figures over pairs or groups would rest on a part of the questions."""
    if unanswered:
        raise DataError(
            f"{path}: {len(unanswered)} of {count} questions have no response, for example "
            f"{', '.join(unanswered[:5])}; figures over pairs and groups of questions need all of "
            f"them"
        )
