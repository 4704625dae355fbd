"""`diffalign evaluate mme`: two yes-or-no questions an image, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.benchmarks.closed_questions import (
    AbstractClosedQuestions,
    in_a_folder,
)
from diffalign.benchmarks.mme import rules as mme
from diffalign.benchmarks.report import Measure, Report, average_panel, edge_notes, panel
from diffalign.benchmarks.saved_responses import empty_notes
from diffalign.generation.responses import ImageQuestion
from diffalign.intervals import Tally


@dataclass(frozen=True, kw_only=True)
class MME(AbstractClosedQuestions):
    """MME of saved responses or of a model; `rules` has the rules.

    `responses` is a folder with a file `TASK.txt` for each task, as the authors' tool takes them.
    """

    questions: Path | None = None
    """To ask a model: the published folder, or one of such files, whose responses are not read."""
    tasks: tuple[str, ...] = mme.OBJECT_TASKS
    """Which tasks; the default are the four about objects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in mme.TASKS]
        if unknown or not self.tasks:
            raise ValueError(
                f"tasks must be some of {', '.join(mme.TASKS)}, got {', '.join(unknown) or 'none'}"
            )
        self.check_questions(self.questions)

    def plan(self) -> str:
        return f"{self.responses or self.questions}: {', '.join(self.tasks)}"

    def to_ask(self, images: Path) -> Sequence[ImageQuestion]:
        assert self.questions is not None  # __post_init__ checked
        return [
            ImageQuestion(
                question_id=q.question_id,
                image=in_a_folder(
                    images, [f"{q.task}/{q.image}", f"{q.task}/images/{q.image}", q.image]
                ),
                text=q.text,
            )
            for q in mme.read_questions(self.questions, self.tasks)
        ]

    def report(self) -> Report:
        if self.responses is not None:
            checked = mme.read_responses(self.responses, self.tasks)
        else:
            assert self.questions is not None
            asked = self.ask_model()
            checked = [
                mme.check(q, asked[q.question_id])
                for q in mme.read_questions(self.questions, self.tasks)
            ]
        images = list(dict.fromkeys(item.question.image for item in checked))
        tallies = {
            task: mme.tally([item for item in checked if item.question.task == task], images)
            for task in self.tasks
        }
        whole = average_panel(
            tallies, mme.MEASURES, self.bootstrap, names=images, further=_total(tallies)
        )
        neither = whole.counts["neither_yes_nor_no"]
        return Report(
            benchmark="mme",
            whole=whole,
            parts={task: panel(t, mme.MEASURES, self.bootstrap) for task, t in tallies.items()}
            if len(tallies) > 1
            else {},
            settings={"tasks": ", ".join(self.tasks), **self.figures_depend_on},
            notes=[
                *empty_notes([item.response for item in checked]),
                *(
                    [
                        f"{neither:,} of {whole.counts['questions']:,} responses hold neither yes "
                        f"nor no in their first four characters and count as wrong, as published."
                    ]
                    if neither
                    else []
                ),
                *edge_notes(whole, apart=("neither_ratio",)),
            ],
            bootstrap=self.bootstrap,
            details=[
                item.row(task=item.question.task, image=item.question.image) for item in checked
            ],
        )


def _total(tallies: Mapping[str, Tally]) -> dict[str, Measure]:
    """The sum of the scores of all tasks."""
    score = mme.MEASURES["score"].statistic

    def total(joined: Tally) -> np.ndarray:
        of_task = [{name: joined[f"{task}/{name}"] for name in mme.COUNTS} for task in tallies]
        return np.sum([score(t) for t in of_task], axis=0)

    return {"total_score": Measure(f"sum of {len(tallies)} scores", "points", total)}
