"""`diffalign evaluate mmhal`: responses to hard questions, rated by a judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.mmhal import rules as mmhal
from diffalign.benchmarks.report import Report, edge_notes, panel
from diffalign.judges.base import AbstractJudge, fill, read_template, verdicts


@dataclass(frozen=True, kw_only=True)
class MMHal(AbstractBenchmark):
    """MMHal-Bench of saved responses; `diffalign.benchmarks.mmhal.rules` has the rules."""

    items: Path
    """The published questions, `mmhal-bench_answer_template.json`, in their order."""
    responses: Path | None = None
    """One response a question, in their order; null where `model_answer` is filled in."""
    judge: AbstractJudge
    """Who rates, for example `judge.kind=endpoint`. RLHF-V's figures are by gpt-4-1106-preview."""
    verdicts: Path
    """JSON lines that keep what the judge said; a rerun asks nothing twice."""
    template: Path | None = None
    """The judge's prompt with {contents}, {question}, {gold} and {response}, or four plain {} in
    this order; null takes our own wording. Figures of papers were made with the published one."""

    @property
    def kept(self) -> tuple[Path, ...]:
        return (self.verdicts,)

    def plan(self) -> str:
        return f"{self.responses or self.items}, rated by {self.judge.name}"

    def report(self) -> Report:
        items = mmhal.read_items(self.items, self.responses)
        template = read_template(self.template, mmhal.OWN_TEMPLATE)
        prompts = {
            str(item.place): fill(
                template,
                contents=", ".join(item.contents),
                question=item.question,
                gold=item.gold,
                response=item.response,
            )
            for item in items
        }
        ratings = verdicts(self.judge, prompts, mmhal.parse_rating, saves=self.verdicts, attempts=1)
        rated = [mmhal.RatedItem(item=item, rating=ratings[str(item.place)] or 0) for item in items]
        unclear = [place for place, rating in ratings.items() if rating is None]
        notes = [
            f"{len(unclear)} replies of the judge name no rating or several and count as 0, as "
            f"published: items {', '.join(unclear[:10])}"
        ]
        whole = len(items) == mmhal.ITEMS
        names = [str(item.place) for item in items]
        figures = panel(mmhal.tally(rated), mmhal.MEASURES, self.bootstrap, names=names)
        return Report(
            benchmark="mmhal",
            whole=figures,
            parts={
                kind: panel(mmhal.tally(of_kind), mmhal.MEASURES, self.bootstrap)
                for kind in mmhal.QUESTION_TYPES
                if (of_kind := [r for r in rated if r.item.question_type == kind])
            },
            settings={
                "judge": self.judge.name,
                "template": "own wording" if self.template is None else self.template.name,
            },
            notes=[
                *(notes if unclear else []),
                *edge_notes(figures),
                *([] if whole else [f"{len(items)} of {mmhal.ITEMS} published questions."]),
            ],
            bootstrap=self.bootstrap,
            details=[item.row() for item in rated],
        )
