"""Pairs of a model's own responses: by the scores of a judge, or with one of them corrected.

Sources: RLAIF-V (Yu et al. 2024, arXiv:2405.17220) for pairs by score. OPA-DPO (Yang et al. 2025,
arXiv:2501.09695) for corrections, with as little rewritten as makes a response true: sentence by
sentence, each with a score from 1 to 4 and a kind of error, from a file or by a judge. Departure: a
judge reads the response of the data set, and sees no image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

from diffalign.errors import DataError
from diffalign.files import numbered_lines, parse_json_line
from diffalign.judges.base import fill
from diffalign.parsing import parse_json

Pair = tuple[str, str]
"""The better response and the worse one."""

_RATIOS = tuple(step / 50 for step in range(50))
"""0, .02, ..., .98: how much longer the worse response may be, as a share of its own length."""


def scored_pairs(
    responses: Sequence[str], scores: Sequence[float], *, min_gap: float
) -> list[Pair]:
    """Pairs whose scores differ enough, the widest gaps first.

    Args:
        responses: distinct.
        scores: one a response, higher is better; RLAIF-V takes minus the number of claims in it
            that were judged false.
        min_gap: least difference of the scores of a pair; 1 in RLAIF-V.
    """
    both = permutations(range(len(responses)), 2)
    wide = [(i, j) for i, j in both if scores[i] - scores[j] >= max(min_gap, 0.0)]
    different = [(i, j) for i, j in wide if scores[i] > scores[j]]
    different.sort(key=lambda pair: scores[pair[1]] - scores[pair[0]])  # stable
    return [(responses[i], responses[j]) for i, j in different]


def length_excess(better: str, worse: str) -> float:
    """How much longer the worse response is, as a share of its length in words."""
    long = max(1, len(worse.split()))
    return (long - len(better.split())) / long


def length_bound(pairs: Sequence[Pair]) -> float:
    """The bound on `length_excess` under which both sides are most equally long on average.

    Of 0, .02, ..., .98; the largest of equally good ones, which keeps most.

    Args:
        pairs: of the whole data set, at least one.
    """

    def imbalance(bound: float) -> float:
        kept = [pair for pair in pairs if length_excess(*pair) <= bound]
        if not kept:
            return float("inf")
        words = sum(len(worse.split()) - len(better.split()) for better, worse in kept)
        return abs(words) / len(kept)

    return min(reversed(_RATIOS), key=imbalance)


Value = TypeVar("Value")

_INSTRUCTION = """\
Below are a question about an image, a reference answer that is true, and an answer by a model.
Correct the model's answer with the fewest changes. Go through it sentence by sentence, keep what
agrees with the reference answer, rewrite what contradicts it, and add what is important and
missing.

Reply with one JSON object and nothing else. Its keys are "0", "1", ... for the sentences of the
model's answer in their order, and "Added" if something is added. Each value is an object with
"copied_content" (the sentence as it stands, word for word),
"score" (4 true, 3 mostly true, 2 mostly wrong, 1 wrong),
"error_type" ("correct", "image_recognition_error" or "language_comprehension_error"),
"object" (what the error is about, or ""),
"rewritten_content" (the corrected sentence; the same as copied_content if it is true),
"reason" (why, in a few words).
"Added" has "rewritten_content" and "reason" alone.

Question: {question}
Reference answer: {reference}
Answer of the model: {response}"""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A response after correction."""

    revised: str
    """The corrected response."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The judgements, by the number of the sentence, in the form of OPA-DPO's AI_json_report."""


def read_corrections(path: Path) -> dict[tuple[str, int], Correction]:
    """Corrections by question id and number of the sample, from JSON lines.

    A line has `id`, `revised`, and perhaps `sample` (0 if it is left out) and `report`.

    Raises:
        DataError: there is no such file, or a line is none of these or repeats another.
    """
    needs = "id, revised (a text), and perhaps sample (a number) and report (an object)"
    return _by_sample(path, _correction, needs=needs)


def read_scores(path: Path) -> dict[tuple[str, int], float]:
    """Scores by question id and number of the sample, from JSON lines of `id`, `sample`, `score`.

    Raises:
        DataError: there is no such file, or a line is none of these or repeats another.
    """
    return _by_sample(path, _score, needs="id, score (a finite number), and perhaps sample")


def judge_prompt(question: str, reference: str, response: str) -> str:
    """The prompt of a judge."""
    return fill(_INSTRUCTION, question=question, reference=reference, response=response)


def parse_correction(reply: str) -> Correction:
    """The correction in a reply of a judge.

    Raises:
        ValueError: it is no JSON object of sentences.
    """
    try:
        report = parse_json(reply[reply.find("{") : reply.rfind("}") + 1], "the reply")
    except DataError as error:
        raise ValueError(str(error)) from error
    if not isinstance(report, dict):
        raise ValueError("the reply is no JSON object")
    numbers = sorted((key for key in report if key.isdecimal()), key=int)
    parts = [report[key] for key in (*numbers, "Added") if report.get(key)]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("a sentence of the reply is no JSON object")
    texts = [str(part.get("rewritten_content") or "").strip() for part in parts]
    revised = " ".join(text for text in texts if text)
    if not numbers or not revised:
        raise ValueError("the reply rewrites no sentence")
    return Correction(revised=revised, report=report)


def _by_sample(
    path: Path, parse: Callable[[Mapping[str, Any]], Value], *, needs: str
) -> dict[tuple[str, int], Value]:
    """The lines of a file, by id and number of the sample."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; it should hold one JSON object a line")
    found: dict[tuple[str, int], Value] = {}
    for number, line in numbered_lines(path):
        row = parse_json_line(line, path, number)
        try:
            key = (str(row["id"]), int(row.get("sample", 0)))
            value = parse(row)
        except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: line {number} must have {needs}") from error
        if key in found:
            raise DataError(f"{path}: line {number} is the second about {key[0]}, sample {key[1]}")
        found[key] = value
    return found


def _correction(row: Mapping[str, Any]) -> Correction:
    found = Correction(revised=row["revised"].strip(), report=row.get("report") or {})
    if not found.revised or not isinstance(found.report, Mapping):
        raise ValueError
    return found


def _score(row: Mapping[str, Any]) -> float:
    score = float(row["score"])
    if not math.isfinite(score):
        raise ValueError
    return score
