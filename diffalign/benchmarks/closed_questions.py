"""Benchmarks of closed questions about images: yes or no, or one of several letters.

What they share: responses are read from a file or asked of a model, each question once, and counts
come by image. How a response is read and what is counted is the benchmark's own, in its `rules.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.errors import DataError
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ask, check_one_source
from diffalign.models.base import AbstractModel


class Labelled(Protocol):
    """A question to which one response is right."""

    @property
    def question_id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str: ...


Question = TypeVar("Question", bound=Labelled)


@dataclass(frozen=True, kw_only=True)
class CheckedResponse(Generic[Question]):
    """A response next to its question."""

    question: Question
    response: str
    said: str | None
    """What was read in it, as labels are written; None where nothing could be."""

    @property
    def is_right(self) -> bool:
        return self.said == self.question.label

    def row(self, **about: str) -> dict[str, Any]:
        """For a file of details.

        Args:
            **about: what else it tells of the question.
        """
        return {
            "question_id": self.question.question_id,
            **about,
            "question": self.question.text,
            "label": self.question.label,
            "answer": self.response,
            "said": self.said,
        }


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
    def to_ask(self, images: Path) -> Sequence[ImageQuestion]:
        """The questions, in their order, each once and without the suffix.

        Args:
            images: the folder of the images.

        Raises:
            DataError: a file cannot be used.
        """

    def asked(self) -> Asked | None:
        if self.responses is not None:
            return None
        assert self.asking is not None  # __post_init__ checked
        questions = [
            replace(question, text=question.text + self.suffix)
            for question in self.to_ask(self.asking.images)
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
    """The file of the first of several names that is there, else of the first of all.

    Args:
        folder: of the images.
        names: paths below it.
    """
    files = [folder / name for name in names]
    return next((file for file in files if file.is_file()), files[0])


def refuse_unanswered(unanswered: Sequence[str], count: int, path: Path) -> None:
    """Raise DataError where figures over pairs or groups would rest on a part of the questions."""
    if unanswered:
        raise DataError(
            f"{path}: {len(unanswered)} of {count} questions have no response, for example "
            f"{', '.join(unanswered[:5])}; figures over pairs and groups of questions need all of "
            f"them"
        )
