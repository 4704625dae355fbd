"""`diffalign evaluate pope`: yes-or-no questions about objects, by split and on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.closed_questions import AbstractClosedQuestions
from diffalign.benchmarks.pope import rules as pope
from diffalign.benchmarks.report import Report, average_panel, edge_notes, panel
from diffalign.benchmarks.saved_responses import empty_notes
from diffalign.data.responses.coco import image_file
from diffalign.generation.responses import ImageQuestion
from diffalign.intervals import Tally


@dataclass(frozen=True, kw_only=True)
class Pope(AbstractClosedQuestions):
    """POPE of saved responses; `diffalign.benchmarks.pope.rules` has the rules and their source."""

    questions: Path | Mapping[str, Path]
    """The published file of one split, or of several by name: `questions.random=FILE`."""
    responses: Path | Mapping[str, Path] | None = None  # type: ignore[assignment]  # several
    """Saved responses to them, likewise: `{question_id, response}`, one a line or a JSON list; null
    asks the model."""
    suffix: str = ""
    """Text after each question when a model is asked; LLaVA's own evaluation puts
    `\\nAnswer the question using a single word or phrase.`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.responses is None:
            return
        questions, responses = _by_split(self.questions), _by_split(self.responses)
        if not questions or set(questions) != set(responses):
            raise ValueError(
                "questions and responses must name the same splits, got "
                f"{', '.join(questions) or 'none'} and {', '.join(responses) or 'none'}; write "
                "questions=FILE responses=FILE, or questions.random=FILE responses.random=FILE ..."
            )

    def plan(self) -> str:
        responses = {} if self.responses is None else _by_split(self.responses)
        return "; ".join(
            f"{responses.get(split, 'the model')} to {path}"
            for split, path in _by_split(self.questions).items()
        )

    def report(self) -> Report:
        questions = self._questions_by_split()
        checked = self._checked(questions)
        images = list(dict.fromkeys(q.image for split in questions.values() for q in split))
        tallies = {split: pope.tally(items, images) for split, items in checked.items()}
        whole = average_panel(tallies, pope.MEASURES, self.bootstrap, names=images)
        responses = [item.response for items in checked.values() for item in items]
        return Report(
            benchmark="pope",
            whole=whole,
            parts={s: panel(t, pope.MEASURES, self.bootstrap) for s, t in tallies.items()}
            if len(tallies) > 1
            else {},
            settings={
                "positive": "yes",
                "splits": ", ".join(tallies),
                **self.figures_depend_on,
            },
            left_out={
                f"questions of {split} without a response": _unanswered(
                    questions[split], checked[split]
                )
                for split in questions
            },
            notes=[
                *empty_notes(responses),
                *_notes(tallies),
                *edge_notes(whole, apart=("neither_ratio",)),
            ],
            bootstrap=self.bootstrap,
            details=[{"split": s, **i.row()} for s, items in checked.items() for i in items],
        )

    def _checked(
        self, questions: Mapping[str, Sequence[pope.Question]]
    ) -> dict[str, list[pope.CheckedResponse]]:
        if self.responses is not None:
            files = _by_split(self.responses)
            return {s: pope.read_responses(files[s], asked) for s, asked in questions.items()}
        ids, said = _ids(questions), self.ask_model()
        return {
            split: [
                pope.CheckedResponse(question=q, response=said[ids[q.image, q.text]])
                for q in of_split
            ]
            for split, of_split in questions.items()
        }

    def to_ask(self, images: Path) -> Sequence[ImageQuestion]:
        return [
            ImageQuestion(question_id=i, image=image_file(images, image), text=text)
            for (image, text), i in _ids(self._questions_by_split()).items()
        ]

    def _questions_by_split(self) -> dict[str, list[pope.Question]]:
        return {s: pope.read_questions(path) for s, path in _by_split(self.questions).items()}


def _ids(questions: Mapping[str, Sequence[pope.Question]]) -> dict[tuple[str, str], str]:
    """Image and text of each question, once: splits share those about what is there."""
    asked: dict[tuple[str, str], str] = {}
    for split, of_split in questions.items():
        for q in of_split:
            asked.setdefault((q.image, q.text), f"{split}/{q.question_id}")
    return asked


def _notes(tallies: Mapping[str, Tally]) -> list[str]:
    """Notes on responses that are neither yes nor no, and how the figures count them."""
    total = {name: int(sum(t[name].sum() for t in tallies.values())) for name in pope.COUNTS}
    notes = []
    if total["neither_yes_nor_no"]:
        notes.append(
            f"{total['neither_yes_nor_no']:,} of {total['questions']:,} responses say neither yes "
            f"nor no and count as yes, as published. Counted as wrong they would leave "
            f"{total['right_in_words']:,} right: accuracy "
            f"{100 * total['right_in_words'] / total['questions']:.1f} %."
        )
    if total["no_read_as_yes"]:
        notes.append(
            f"{total['no_read_as_yes']:,} responses say no in letters that the published rule does "
            f"not know, such as NO, and count as yes."
        )
    return notes


def _unanswered(
    questions: Sequence[pope.Question], checked: Sequence[pope.CheckedResponse]
) -> list[str]:
    answered = {item.question.question_id for item in checked}
    return [q.question_id for q in questions if q.question_id not in answered]


def _by_split(files: Path | Mapping[str, Path]) -> Mapping[str, Path]:
    return {"one split": files} if isinstance(files, Path) else files
