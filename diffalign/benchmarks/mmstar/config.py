"""`diffalign evaluate mmstar`: multiple choice by letter, by text or by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.closed_questions import (
    AbstractClosedQuestions,
    CheckedResponse,
    in_a_folder,
)
from diffalign.benchmarks.mmstar import rules as mmstar
from diffalign.benchmarks.report import Report, edge_notes, panel
from diffalign.benchmarks.saved_responses import RESPONSE_KEYS, empty_notes, responses_to
from diffalign.generation.responses import ImageQuestion

_KEYS = ("prediction", *RESPONSE_KEYS)


@dataclass(frozen=True, kw_only=True)
class MMStar(AbstractClosedQuestions):
    """MMStar, or any multiple choice in the same columns; `rules` has the rules."""

    questions: Path
    """The published table: `question`, `answer`, the options, and `category`."""
    suffix: str = "\nAnswer with the option's letter from the given choices directly."
    """Text after each question when a model is asked; the default is that of LLaVA-1.5."""
    read: mmstar.Reading = "letter"
    """How the choice is known: `letter` as published; `text`, which finds letters and options
    anywhere; `likelihood` asks the model for the most probable letter and lets it write nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read == "likelihood" and self.model is None:
            raise ValueError(
                "read=likelihood needs a model of this machine to ask: saved responses tell no "
                "probabilities, and a server is not asked for them. Use read=letter or read=text"
            )

    def plan(self) -> str:
        return f"{self.responses or 'the model'} to {self.questions}, by {self.read}"

    def to_ask(self, images: Path) -> Sequence[ImageQuestion]:
        return [
            ImageQuestion(
                question_id=q.question_id,
                image=in_a_folder(
                    images, [q.image, f"{q.question_id}.jpg", f"{q.question_id}.png"]
                ),
                text=q.text,
                choices=tuple(q.options) if self.read == "likelihood" else (),
            )
            for q in mmstar.read_questions(self.questions)
        ]

    def report(self) -> Report:
        questions = mmstar.read_questions(self.questions)
        ids = [question.question_id for question in questions]
        said = (
            self.ask_model()
            if self.responses is None
            else responses_to(self.responses, ids, keys=_KEYS)
        )
        checked = [
            CheckedResponse(
                question=q,
                response=said[q.question_id],
                said=mmstar.read(said[q.question_id], q, self.read),
            )
            for q in questions
            if q.question_id in said
        ]
        images = list(dict.fromkeys(item.question.image for item in checked))
        whole = panel(mmstar.tally(checked, images), mmstar.MEASURES, self.bootstrap, names=images)
        categories = list(dict.fromkeys(item.question.category for item in checked))
        asked_for = {} if self.responses is not None else self.figures_depend_on
        return Report(
            benchmark="mmstar",
            whole=whole,
            parts={
                category: panel(
                    mmstar.tally([i for i in checked if i.question.category == category], images),
                    mmstar.MEASURES,
                    self.bootstrap,
                )
                for category in categories
            }
            if len(categories) > 1
            else {},
            settings={"read": self.read, **asked_for},
            left_out={"questions without a response": [i for i in ids if i not in said]},
            notes=[
                *empty_notes([item.response for item in checked]),
                *edge_notes(whole, apart=("unread_ratio",)),
            ],
            bootstrap=self.bootstrap,
            details=[item.row(category=item.question.category) for item in checked],
        )
