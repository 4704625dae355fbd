"""Sampling and scoring the responses of a round, and the batches that it trains on.

    round-0000/   round.json  responses.jsonl  rows.jsonl
                  sampled/  rewards/   of each batch, until the round is trained on

`responses.jsonl` is for people and stays: every question with all responses and their rewards. What
is trained on are the very tokens that were sampled, whatever their text would be read as.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.batches import TokenBatch
from diffalign.data.responses.chat import EncodedPrompt
from diffalign.data.responses.questions import Question, Unmade, open_questions
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError
from diffalign.files import read_rows, write_json_lines
from diffalign.generation.writing import Request, Writer
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.rewards.base import AbstractReward
from diffalign.rollouts.base import (
    AbstractCollector,
    Phase,
    RoundSummary,
    RunContext,
    Work,
)
from diffalign.rollouts.response_batches import ResponseBatches, Sampled
from diffalign.rollouts.response_rounds import (
    AbstractResponseRollouts,
    Row,
    Rows,
    ScoredResponses,
)
from diffalign.rollouts.round_order import in_batches, own_parts, pack_pool, positions_of_round
from diffalign.rollouts.scoring import WATCHED, component_name, means_of, numbered
from diffalign.seeding import derive_seed

_RESPONSES = "responses.jsonl"
_ROWS = "rows.jsonl"
_LOOKED_AT = 200
"""Questions among which a reward must be able to read one."""


@dataclass(frozen=True)
class _Visit:
    """One question of a round."""

    number: int
    """Its number in the round."""
    member: int
    """The number of the question."""
    seed: int
    """From which the seeds of its responses derive."""


@dataclass(frozen=True)
class _Batch:
    """Consecutive visits of a round, sampled and scored together whatever the number of ranks."""

    visits: Sequence[_Visit]

    @property
    def sampled(self) -> str:
        """The file of its responses."""
        return f"sampled/{self.visits[0].number:04d}.jsonl"

    @property
    def rewards(self) -> str:
        """The file of their rewards."""
        return f"rewards/{self.visits[0].number:04d}.jsonl"


class ResponseCollector(AbstractCollector):
    """Samples responses with the policy, scores them, and lays out what is trained on."""

    def __init__(self, rollouts: AbstractResponseRollouts, run: RunContext) -> None:
        """Open the questions and look whether they can be scored.

        Raises:
            DataError: none of them can, or their files cannot be read.
            ConfigError: a reward lacks something.
        """
        self._settings = rollouts
        self._run = run
        self._questions = open_questions(rollouts.questions)
        self._rows = ResponseBatches(
            self._questions, rollouts.views, run.model, rollouts.questions.max_pixels
        )
        self._rewards = dict(zip(rollouts.reward_names, rollouts.rewards, strict=True))
        names = numbered([component_name(reward) for reward in rollouts.watch])
        self._watched = dict(zip(names, rollouts.watch, strict=True))
        for reward in (*rollouts.rewards, *rollouts.watch):
            reward.check()
        self._refuse_unreadable()

    def describe(self) -> list[str]:
        settings, layout = self._settings, self._run.layout
        return [
            self._questions.summary,
            f"{len(self._questions):,} questions; {layout.samples_per_step} rows an optimiser step",
            *settings.further_lines(layout.samples_per_step),
        ]

    def fingerprint(self) -> str:
        rewards = [reward.fingerprint for reward in self._settings.rewards]
        parts = "\0".join([self._questions.fingerprint, str(len(self._questions)), *rewards])
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()

    def phases(self, number: int) -> Iterator[Phase]:
        batches = self._batches(number)

        def works(name: str, do: Any) -> list[Work]:
            return [Work(getattr(b, name), self._count(b), partial(do, b)) for b in batches]

        yield Phase("sample", works("sampled", self._sample))
        yield Phase("score", works("rewards", self._score))

    def _batches(self, number: int) -> list[_Batch]:
        settings, run_seed = self._settings, self._run.run_seed
        positions = positions_of_round(
            len(self._questions), number, count=settings.questions_per_round, run_seed=run_seed
        )
        visits = [
            _Visit(place, position.member, derive_seed(run_seed, "visit", position.index))
            for place, position in enumerate(positions)
        ]
        return [_Batch(some) for some in in_batches(visits, settings.questions_per_batch)]

    def _count(self, batch: _Batch) -> int:
        """How many rows are made; a visit that samples none counts as one."""
        return sum(max(1, self._settings.samples_at(visit.seed)) for visit in batch.visits)

    def _sample(self, batch: _Batch, model: VisionLanguageModel, folder: Path) -> None:
        settings = self._settings
        writer = Writer(model, batch_size=self._count(batch))
        remembers = settings.remembers(self._run.layout.samples_per_step)
        requests: list[Request] = []
        prompts: dict[int, tuple[EncodedPrompt, int]] = {}
        problems: dict[int, str] = {}
        for visit in batch.visits:
            item = self._questions[visit.member]
            problem = self._problem(item)
            if problem is not None:
                problems[visit.number] = problem
                continue
            try:
                prompt = self._rows.prompt(item)
                writer.check_length(writer.ask(prompt), settings.max_new_tokens)
                self._rows.check_data(prompt, item, settings.data_responses_at(visit.seed))
            except UnusableRowError as error:
                problems[visit.number] = f"{error.reason.value}: {error.detail}"
                continue
            prompts[visit.number] = (prompt, len(item.images))
            requests += [
                writer.ask(prompt, seed=derive_seed(visit.seed, "response", place))
                for place in range(settings.samples_at(visit.seed))
            ]
        written = iter(
            writer.write(
                requests,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
            )
        )
        rows = []
        for visit in batch.visits:
            problem = problems.get(visit.number)
            count = 0 if problem else settings.samples_at(visit.seed)
            own = [next(written) for _ in range(count)]
            rows.append(
                Sampled(
                    visit=visit.number,
                    tokens=tuple(tuple(some.tokens.tolist()) for some in own),
                    log_probs=self._rows.log_probs(model, *prompts[visit.number], own)
                    if remembers and own
                    else (),
                    texts=tuple(some.text.strip() for some in own),
                    unfinished=sum(not writer.ends(some.tokens) for some in own),
                    unusable=problem,
                )
            )
        write_json_lines(folder / batch.sampled, map(asdict, rows))

    def _score(self, batch: _Batch, model: VisionLanguageModel, folder: Path) -> None:
        sampled = read_rows(Sampled, folder / batch.sampled)
        for reward in (*self._rewards.values(), *self._watched.values()):
            reward.to(model.device)
        rows = [
            self._scored(visit, found) for visit, found in zip(batch.visits, sampled, strict=True)
        ]
        write_json_lines(folder / batch.rewards, map(asdict, rows))

    def _scored(self, visit: _Visit, found: Sampled) -> ScoredResponses:
        item = self._questions[visit.member]
        known = ScoredResponses(
            visit=visit.number,
            question_id=item.sample_id,
            question=item.text if isinstance(item, Question) else "",
            response=item.response if isinstance(item, Question) else None,
            texts=found.texts,
            tokens=tuple(map(len, found.tokens)),
            unfinished=found.unfinished,
            unusable=found.unusable,
        )
        if not found.texts:
            return known
        return replace(
            known,
            rewards={name: _scores(by, item, found.texts) for name, by in self._rewards.items()},
            watched={
                name: _scores(by, item, found.texts)
                for name, by in self._watched.items()
                if by.obstacle(item) is None
            },
        )

    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        groups = [
            group
            for batch in self._batches(number)
            for group in read_rows(ScoredResponses, folder / batch.rewards)
        ]
        write_json_lines(folder / _RESPONSES, map(asdict, groups))
        usable = [group for group in groups if group.unusable is None]
        if not usable:
            raise DataError(
                f"{folder}: none of the round's {len(groups)} questions could be asked and scored, "
                f"the first one because {groups[0].unusable}"
            )
        self._refuse_silence(usable, folder)
        made = self._settings.rows(usable, derive_seed(self._run.run_seed, "rows", number))
        write_json_lines(
            folder / _ROWS,
            [
                {**asdict(row), "sample_id": f"round-{number}/{row.visit:04d}/{row.sample_id}"}
                for row in made.rows
            ],
        )
        return self._summary(number, groups, usable, made)

    def _summary(
        self,
        number: int,
        groups: Sequence[ScoredResponses],
        usable: Sequence[ScoredResponses],
        made: Rows,
    ) -> RoundSummary:
        micro_batches = len(self._packed(number, made.rows))
        trained = micro_batches * self._run.layout.micro_batch
        texts = [text for group in usable for text in group.texts]
        summary: dict[str, float] = {"responses": len(texts)}
        said = []
        for names, prefix in ((self._rewards, ""), (self._watched, WATCHED)):
            for name in names:
                found = [
                    score
                    for group in usable
                    for score in (group.watched if prefix else group.rewards).get(name, ())
                ]
                figures = means_of(name, found, prefix)
                summary |= figures
                if figures:
                    mean, spread = figures.values()
                    label = f"watched: {name}" if prefix else name
                    said.append(f"{label} {mean:.4g} \N{PLUS-MINUS SIGN} {spread:.2g}")
        if texts:
            lengths = [length for group in usable for length in group.tokens]
            summary |= {
                "length": statistics.fmean(lengths),
                "unfinished_share": sum(group.unfinished for group in usable) / len(texts),
                "distinct_share": sum(len(set(group.texts)) for group in usable) / len(texts),
            }
        summary |= {**made.figures, "rows": trained, "rows_dropped": len(made.rows) - trained}
        skipped = Counter(
            f"questions that cannot be used ({group.unusable.partition(':')[0]})"
            for group in groups
            if group.unusable is not None
        )
        skipped.update(made.skipped)
        skipped["rows that filled no optimiser step"] = len(made.rows) - trained
        unusable = len(groups) - len(usable)
        said += [made.sentence] if made.sentence else []
        said += [f"{unusable} questions could not be used"] if unusable else []
        return RoundSummary(
            micro_batches=micro_batches,
            summary=summary,
            skipped={reason: count for reason, count in skipped.items() if count},
            sentence=f"{len(texts)} responses to {len(usable)} questions, "
            f"{'; '.join(said)}; training on {trained} of {len(made.rows)} rows",
        )

    def batches(self, number: int, folder: Path, samples: int) -> Iterator[TokenBatch]:
        rows = read_rows(Row, folder / _ROWS)
        batches = self._batches(number)
        sampled = {
            found.visit: found
            for batch in batches
            for found in read_rows(Sampled, folder / batch.sampled)
        }
        members = {visit.number: visit.member for batch in batches for visit in batch.visits}
        for part in own_parts(self._packed(number, rows), self._run.layout, samples):
            yield self._rows.batch([rows[i] for i in part], members, sampled)

    def _packed(self, number: int, rows: Sequence[Row]) -> list[list[int]]:
        layout = self._run.layout
        return pack_pool(
            range(len(rows)),
            rows=layout.micro_batch,
            accumulation=layout.micro_batches,
            seed=derive_seed(self._run.run_seed, "order", number),
        )

    def release(self, folder: Path) -> None:
        for file in (*folder.glob("sampled/*"), *folder.glob("rewards/*")):
            file.unlink(missing_ok=True)

    def _problem(self, item: Question | Unmade) -> str | None:
        """Why a question cannot be used; None if it can."""
        if isinstance(item, Unmade):
            return f"{item.reason}: {item.detail}"
        own = self._settings.obstacle(item)
        if own is not None:
            return own
        for name, reward in self._rewards.items():
            found = reward.obstacle(item)
            if found is not None:
                return f"{name} cannot score it: {found}"
        return None

    def _refuse_unreadable(self) -> None:
        """Raise DataError where no question can be scored, before anything is sampled."""
        reasons: list[str] = []
        for item in islice(self._questions, _LOOKED_AT):
            found = self._problem(item)
            if found is None:
                return
            reasons.append(f"{item.sample_id}: {found}")
        first = f"; {reasons[0]}" if reasons else ""
        raise DataError(
            f"rollouts.questions: of {self._questions.summary}, none of the first {len(reasons)} "
            f"questions can be used{first}. Give rollouts.questions.columns, or a reward that "
            f"reads them"
        )

    def _refuse_silence(self, groups: Sequence[ScoredResponses], folder: Path) -> None:
        """Raise DataError where a reward gave no response of a round a number."""
        sampled = [group for group in groups if group.texts]
        for name in self._rewards:
            scores = [score for group in sampled for score in group.rewards[name]]
            if scores and all(score is None for score in scores):
                raise DataError(
                    f"{folder}: the reward {name} gave none of the round's {len(scores)} responses "
                    f"a number. Look at {_RESPONSES} there"
                )


def _scores(
    reward: AbstractReward, question: Question, texts: Sequence[str]
) -> tuple[float | None, ...]:
    scores = reward.score(question, texts)
    if len(scores) != len(texts):
        raise DataError(
            f"the reward {component_name(reward)} must give {len(texts)} responses as many "
            f"numbers, and gave {len(scores)}"
        )
    return tuple(float(score) if math.isfinite(score) else None for score in scores)
