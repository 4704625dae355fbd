"""`diffalign evaluate hallusionbench`: yes or no about figures and their changed versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.benchmarks.closed_questions import (
    AbstractClosedQuestions,
    refuse_unanswered,
)
from diffalign.benchmarks.hallusionbench import rules
from diffalign.benchmarks.report import Report, edge_notes, panel
from diffalign.benchmarks.saved_responses import empty_notes
from diffalign.generation.responses import ImageQuestion
from diffalign.judges.base import AbstractJudge, fill, read_template, verdicts

_APART = (
    *("unclear_ratio", "false_positive_ratio"),
    *("language_hallucination", "visual_illusion", "mixed"),
)


@dataclass(frozen=True, kw_only=True)
class HallusionBench(AbstractClosedQuestions):
    """HallusionBench of saved responses or of a model; `rules` has the rules.

    `responses` is the published `HallusionBench.json` with `model_prediction` filled in.
    """

    questions: Path | None = None
    """To ask a model: the published `HallusionBench.json`. `asking.images` is the folder that holds
    `VD` and `VS`."""
    judge: AbstractJudge | None = None
    """Who says whether a response is correct, for example `judge.kind=endpoint`; null reads yes or
    no from its first sentence, whose figures are not those of papers."""
    verdicts: Path | None = None
    """JSON lines that keep what the judge said; a rerun asks nothing twice."""
    template: Path | None = None
    """The judge's prompt with {question}, {gold} and {response}; null takes our own wording."""
    same_template: Path | None = None
    """The prompt of the second judgement with {response} and {original}; null likewise."""
    correctness: str | None = None
    """In place of a judge: the key of `responses` that holds judgements already, such as
    `gpt4v_output_gpt_check`; `same` is read next to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_questions(self.questions)
        if (self.judge is None) != (self.verdicts is None):
            raise ValueError(
                "judge and verdicts go together: verdicts=FILE.jsonl keeps what the judge says"
            )
        if self.correctness is not None and (self.judge or self.responses is None):
            raise ValueError(
                "correctness names judgements that lie in responses, so it goes with saved "
                "responses and without a judge"
            )

    @property
    def kept(self) -> tuple[Path, ...]:
        return (*super().kept, *((self.verdicts,) if self.verdicts else ()))

    def plan(self) -> str:
        return f"{self.responses or self.questions}, {self._judged_by}"

    @property
    def _judged_by(self) -> str:
        if self.correctness is not None:
            return f"judged in the file ({self.correctness})"
        return "yes or no (stand-in)" if self.judge is None else f"judged by {self.judge.name}"

    def to_ask(self, images: Path) -> Sequence[ImageQuestion]:
        assert self.questions is not None  # __post_init__ checked
        return [
            ImageQuestion(
                question_id=q.question_id,
                image=None if q.image is None else images / q.image,
                text=q.text,
            )
            for q, _ in rules.read_items(self.questions)
        ]

    def report(self) -> Report:
        path = self.responses or self.questions
        assert path is not None  # __post_init__ checked
        items = rules.read_items(path)
        if self.responses is None:
            said = self.ask_model()
        else:
            said = {q.question_id: str(row.get(rules.RESPONSE) or "") for q, row in items}
            unanswered = [q.question_id for q, row in items if rules.RESPONSE not in row]
            refuse_unanswered(unanswered, len(items), self.responses)
        judged = self._judge(items, said)
        sets = list(dict.fromkeys(item.question.set_name for item in judged))
        whole = panel(rules.tally(judged, sets), rules.MEASURES, self.bootstrap, names=sets)
        by_category = {
            category: [item for item in judged if item.question.category == category]
            for category in ("VD", "VS")
        }
        return Report(
            benchmark="hallusionbench",
            whole=whole,
            parts={
                category: panel(rules.tally(of, sets), rules.MEASURES, self.bootstrap)
                for category, of in by_category.items()
            }
            if all(by_category.values())
            else {},
            settings={
                "judged": self._judged_by,
                **(
                    {"template": "own wording" if self.template is None else self.template.name}
                    if self.judge
                    else {}
                ),
                **self.figures_depend_on,
            },
            notes=[
                *empty_notes([item.response for item in judged]),
                *(
                    ["Without a judge the figures are not those of papers."]
                    if self.judge is None and self.correctness is None
                    else []
                ),
                *edge_notes(whole, apart=_APART),
            ],
            bootstrap=self.bootstrap,
            resampled="sets of figures",
            details=[item.row() for item in judged],
        )

    def _judge(
        self,
        items: Sequence[tuple[rules.Question, Mapping[str, Any]]],
        said: Mapping[str, str],
    ) -> list[rules.JudgedResponse]:
        questions = {question.question_id: question for question, _ in items}
        originals = {q.group: said[i] for i, q in questions.items() if q.figure_id == "0"}
        if self.correctness is not None:
            judged, same = {}, {}
            for question, row in items:
                place = f"{self.responses}: {question.question_id}"
                judged[question.question_id] = rules.judged_in_file(
                    row, self.correctness, place=place
                )
                same[question.question_id] = str(row.get("same", "1")) == "1"
        elif self.judge is None:
            judged = {i: rules.read_yes_no(said[i], q.label) for i, q in questions.items()}
            same = {
                i: rules.says(said[i]) == rules.says(originals[q.group])
                for i, q in questions.items()
            }
        else:
            judged, same = self._ask_judge(self.judge, questions, said, originals)
        return [
            rules.JudgedResponse(question=q, response=said[i], judged=judged[i], same=same[i])
            for i, q in questions.items()
        ]

    def _ask_judge(
        self,
        judge: AbstractJudge,
        questions: Mapping[str, rules.Question],
        said: Mapping[str, str],
        originals: Mapping[str, str],
    ) -> tuple[dict[str, int], dict[str, bool]]:
        assert self.verdicts is not None  # __post_init__ checked
        template = read_template(self.template, rules.OWN_TEMPLATE)
        prompts = {
            i: fill(template, question=q.text, gold=q.gold, response=said[i])
            for i, q in questions.items()
        }
        judged = verdicts(judge, prompts, rules.parse_correctness, saves=self.verdicts, attempts=1)
        template = read_template(self.same_template, rules.OWN_SAME_TEMPLATE)
        prompts = {
            f"same/{i}": fill(template, response=said[i], original=originals[q.group])
            for i, q in questions.items()
            if q.figure_id != "0"
        }
        same = verdicts(judge, prompts, rules.parse_same, saves=self.verdicts, attempts=1)
        return judged, {i: same.get(f"same/{i}", True) for i in questions}
