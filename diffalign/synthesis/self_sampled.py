"""The model's own responses, and what makes pairs of them: the truth, corrections, or scores.

Several responses to every question are sampled and kept once in `made.jsonl`. Pairs are made of
them afterwards, without the model, so that corrections and scores can be given when they are there:

- neither: the response of the data set is chosen, an own one is rejected;
- corrections of a file or a judge: the data set's response, the corrected one and the own one, as
  OPA-DPO trains on them (Yang et al. 2025, arXiv:2501.09695);
- scores of a file or a reward model: own responses against each other by the rule of RLAIF-V (Yu
  et al. 2024, arXiv:2405.17220).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from diffalign.config import MAY_CHANGE
from diffalign.data.responses.formats.base import numbered
from diffalign.data.responses.questions import Question, Unmade
from diffalign.data.responses.records import IMAGE
from diffalign.generation.writing import Request
from diffalign.judges.base import AbstractJudge, verdicts
from diffalign.models.preference.rewards import exported
from diffalign.ranges import AtLeast
from diffalign.seeding import derive_seed
from diffalign.synthesis.base import (
    NO_RESPONSE,
    SAME_RESPONSE,
    AbstractSynthesis,
    Context,
    Made,
    Maker,
    messages,
    prepared,
)
from diffalign.synthesis.pairing import (
    Correction,
    judge_prompt,
    length_bound,
    length_excess,
    parse_correction,
    read_corrections,
    read_scores,
    scored_pairs,
)
from diffalign.synthesis.rewards import rewards_of

EMPTY = "the model wrote nothing"
UNCORRECTED = "no correction"
UNSCORED = "fewer than two scored responses"
NO_GAP = "no two scores differ enough"
NO_SUCH_RESPONSE = "corrected or scored, but not made"
TOO_LONG = "rejected side too long"


@dataclass(frozen=True, kw_only=True)
class OwnResponses(AbstractSynthesis):
    """Responses of the model that is to be trained, sampled before it is."""

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "pairs_per_question",
            "corrections",
            "scores",
            "reward",
            "judge",
            "judge_attempts",
            "min_gap",
            "balance_lengths",
        }
    )

    samples: Annotated[int, AtLeast(1)] = 1
    """Responses sampled for a question; 1 as OPA-DPO, 10 for RLAIF-V."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """At which they are sampled; 0 writes the most probable response, of which more than one is the
    same. Ours."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 512
    """Of a response. Ours; OPA-DPO trains on 896 at most."""
    pairs_per_question: Annotated[int, AtLeast(1)] = 1
    """Pairs made of a question at most: of the first own responses, or of the widest gaps."""
    corrections: Path | None = None
    """JSON lines of `id`, `revised`, and perhaps `sample` (0 if left out) and `report`; ids and
    numbers of samples are those of made.jsonl."""
    scores: Path | None = None
    """JSON lines of `id`, `sample` and `score`, higher is better."""
    reward: Path | None = field(default=None, metadata=MAY_CHANGE)
    """In place of `scores`, a run of a reward model of responses (`model.kind: vlm_reward` with
    `candidates: responses`), which scores own responses here; a difference is a log-odds, so that
    `min_gap` 1 is odds of e to 1."""
    judge: AbstractJudge | None = None
    """A language model that corrects own responses by that of the data set."""
    judge_attempts: Annotated[int, AtLeast(1)] = 3
    """How often a judge is asked whose reply cannot be read."""
    min_gap: float = 1.0
    """Least difference of the scores of a pair; 1 in RLAIF-V, whose scores count false claims."""
    balance_lengths: bool = True
    """Leave out pairs whose rejected side is so much longer that the sides differ in mean length,
    as RLAIF-V does; for scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, and at temperature 0 they would all be the same: "
                f"set it above 0, or samples to 1"
            )
        given = [
            name for name in ("corrections", "scores", "reward", "judge") if getattr(self, name)
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")

    @property
    def form(self) -> str:
        return "opa_dpo" if self.corrections or self.judge else "trl"

    @property
    def image_columns(self) -> tuple[str, ...]:
        return ("image",) if self.form == "opa_dpo" else ("images",)

    def check(self) -> None:
        if self.judge is not None:
            self.judge.check()
        if self.corrections is not None:
            read_corrections(self.corrections)
        if self.scores is not None:
            read_scores(self.scores)
        if self.reward is not None:
            exported(self.reward)

    def open(self, context: Context) -> Maker:
        return lambda questions: self._sample(questions, context)

    def pairs(self, made: Sequence[Made], folder: Path) -> list[Made | Unmade]:
        if self.scores is not None:
            return self._by_scores(made, read_scores(self.scores))
        if self.reward is not None:
            return self._by_scores(made, rewards_of(made, self.reward, folder))
        if self.corrections is not None:
            return self._corrected(made, read_corrections(self.corrections))
        if self.judge is not None:
            return self._corrected(made, self._judged(made, self.judge, folder))
        return [row for some in made for row in self._against_truth(some)]

    def _sample(self, questions: Sequence[Question], context: Context) -> list[Made | Unmade]:
        asked, results = prepared(questions, lambda question: self._requests(question, context))
        written = iter(
            context.writer.write(
                [request for requests in asked.values() for request in requests],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
        )
        by_id = {question.sample_id: question for question in questions}
        for name, requests in asked.items():
            texts = [next(written).text.strip() for _ in requests]
            results[name] = _kept(by_id[name], texts, context)
        return [results[question.sample_id] for question in questions]

    def _requests(self, question: Question, context: Context) -> list[Request]:
        writer = context.writer
        prompt = writer.prompt(question.turns, [context.image(i) for i in question.images])
        request = writer.ask(prompt)
        writer.check_length(request, self.max_new_tokens)
        return [
            replace(request, seed=derive_seed(context.seed, question.sample_id, "sample", number))
            for number in range(self.samples)
        ]

    def _against_truth(self, some: Made) -> list[Made | Unmade]:
        truth = some.values["answer"]
        if not truth:
            return [Unmade(sample_id=some.sample_id, reason=NO_RESPONSE, detail=repr(truth))]
        others = [text for text in some.values["samples"] if text != truth]
        if not others:
            return [Unmade(sample_id=some.sample_id, reason=SAME_RESPONSE, detail=repr(truth)[:60])]
        pairs = [(truth, other) for other in others[: self.pairs_per_question]]
        return _preferences(some, pairs)

    def _by_scores(
        self, made: Sequence[Made], scores: Mapping[tuple[str, int], float]
    ) -> list[Made | Unmade]:
        found: list[tuple[Made, list[tuple[str, str]]]] = []
        results = _of_no_response(scores, made)
        for some in made:
            samples = some.values["samples"]
            judged = [n for n in range(len(samples)) if (some.sample_id, n) in scores]
            values = [scores[some.sample_id, n] for n in judged]
            pairs = scored_pairs([samples[n] for n in judged], values, min_gap=self.min_gap)
            if pairs:
                found.append((some, pairs[: self.pairs_per_question]))
            else:
                reason = UNSCORED if len(judged) < 2 else NO_GAP
                detail = f"{len(judged)} of {len(samples)} responses have a score: {values}"
                results.append(Unmade(sample_id=some.sample_id, reason=reason, detail=detail))
        every = [pair for _, pairs in found for pair in pairs]
        bound = length_bound(every) if self.balance_lengths and every else 1.0
        for some, pairs in found:
            kept = [pair for pair in pairs if length_excess(*pair) <= bound]
            if kept:
                results += _preferences(some, kept)
            else:
                detail = f"{length_excess(*pairs[0]):.2f} of its length above {bound:g}"
                results.append(Unmade(sample_id=some.sample_id, reason=TOO_LONG, detail=detail))
        return results

    def _judged(
        self, made: Sequence[Made], judge: AbstractJudge, folder: Path
    ) -> dict[tuple[str, int], Correction]:
        prompts = {
            json.dumps([some.sample_id, number]): judge_prompt(
                _asked(some), some.values["answer"], text
            )
            for some in made
            for number, text in enumerate(some.values["samples"][: self.pairs_per_question])
            if some.values["answer"]
        }
        found = verdicts(
            judge,
            prompts,
            parse_correction,
            saves=folder / "judged.jsonl",
            attempts=self.judge_attempts,
        )
        return {tuple(json.loads(key)): correction for key, correction in found.items()}

    def _corrected(
        self, made: Sequence[Made], corrections: Mapping[tuple[str, int], Correction]
    ) -> list[Made | Unmade]:
        results = _of_no_response(corrections, made)
        for some in made:
            samples = some.values["samples"]
            numbers = [n for n in range(len(samples)) if (some.sample_id, n) in corrections]
            if not some.values["answer"] or not numbers:
                reason = UNCORRECTED if some.values["answer"] else NO_RESPONSE
                detail = f"of {len(samples)} responses"
                results.append(Unmade(sample_id=some.sample_id, reason=reason, detail=detail))
                continue
            used = numbers[: self.pairs_per_question]
            results += [
                _three_responses(
                    some,
                    samples[number],
                    corrections[some.sample_id, number],
                    name=numbered(some.sample_id, place, len(used)),
                )
                for place, number in enumerate(used)
            ]
        return results


def _kept(question: Question, texts: Sequence[str], context: Context) -> Made | Unmade:
    """The distinct responses that were written, in the order in which they were first."""
    distinct = [text for text in dict.fromkeys(texts) if text]
    if not distinct:
        return Unmade(sample_id=question.sample_id, reason=EMPTY, detail=f"{len(texts)} responses")
    return Made(
        sample_id=question.sample_id,
        values={
            "images": [context.images.name(image) for image in question.images],
            "prompt": messages(question.turns),
            "answer": (question.response or "").strip(),
            "samples": distinct,
        },
    )


def _of_no_response(keys: Iterable[tuple[str, int]], made: Sequence[Made]) -> list[Made | Unmade]:
    """What files name by id and number, and what is no response."""
    known = {(some.sample_id, n) for some in made for n in range(len(some.values["samples"]))}
    return [
        Unmade(sample_id=name, reason=NO_SUCH_RESPONSE, detail=f"sample {number}")
        for name, number in keys
        if (name, number) not in known
    ]


def _preferences(some: Made, pairs: Sequence[tuple[str, str]]) -> list[Made | Unmade]:
    return [
        Made(
            sample_id=numbered(some.sample_id, place, len(pairs)),
            values={
                "images": some.values["images"],
                "prompt": some.values["prompt"],
                "chosen": chosen,
                "rejected": rejected,
            },
        )
        for place, (chosen, rejected) in enumerate(pairs)
    ]


def _three_responses(some: Made, own: str, correction: Correction, *, name: str) -> Made:
    return Made(
        sample_id=name,
        values={
            "image": some.values["images"],
            "queries": _template(some.values["prompt"]),
            "standard_response": some.values["answer"],
            "original_generate_response": own,
            "AI_pseudo_response": correction.revised,
            "AI_json_report": json.dumps(correction.report, ensure_ascii=False),
        },
    )


def _template(prompt: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as OPA-DPO's data have it: one question alone, or Vicuna's template."""
    turns = [turn for turn in prompt if turn["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    written = [
        f"USER: {turn['content']} "
        if turn["role"] == "user"
        else f"ASSISTANT: {turn['content']}</s>"
        for turn in turns
    ]
    return "".join(written) + "ASSISTANT:"


def _asked(some: Made) -> str:
    return str(some.values["prompt"][-1]["content"]).replace(IMAGE, "").strip()
