"""HallusionBench: yes-or-no questions about figures and about figures that were changed.

Questions come in sets. A set has an original figure (number 0) and changed ones, and the same
questions about all of them. `VD` questions cannot be answered without their figure; `VS` ones can,
and for them figure 0 is no figure at all. Three accuracies are published: of all responses (aAcc),
of questions that are answered right for every figure (qAcc), and of figures for which every
question is (fAcc).

*Rules and oddities of the published code, which are kept:* a response is right, wrong or unclear by
the word of a judge, of whose reply `incorrect` is looked for first, then `correct`. An unclear one
counts as right where there is no figure, and as wrong elsewhere. Figures 0 of VS are in no fAcc.
*Hard* are questions about changed figures that contradict common sense (`visual_input` 2), *easy*
all others. The bias towards yes is read off correctness: a wrong response counts as the opposite of
the truth, an unclear one too. Wrong questions are put down to the language model's own beliefs
(LH), to what it sees (VI), or to both, by how it answered without the change; whether it then said
the same is the word of a second judgement. Their shares, and that of false positives, have no value
where nothing is wrong, where the published code divides by zero.

Source: Guan et al. 2024, HallusionBench, arXiv:2310.14566; as in their released `utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffalign.benchmarks.pope.rules import says
from diffalign.benchmarks.report import Measure
from diffalign.benchmarks.saved_responses import read_objects, refuse_repeated
from diffalign.errors import DataError
from diffalign.intervals import Tally, ratio
from diffalign.parsing import shortly

Category = Literal["VD", "VS"]
WRONG, RIGHT, UNCLEAR = 0, 1, 2
KEYS = (
    *("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input"),
    *("question", "gt_answer"),
)
"""That every item of the published file has."""
RESPONSE = "model_prediction"
_HARD = 2

OWN_TEMPLATE = """\
Compare a prediction with the reference answer to a question. Reply with one word: "correct" if the
prediction agrees with the reference, "incorrect" if it contradicts it, "unclear" if it commits
itself to nothing.

Question: {question}
Reference answer: {gold}
Prediction: {response}
"""
OWN_SAME_TEMPLATE = """\
Two responses were given to two questions that you do not know. Could both be true of one thing?
Reply with one word: "same" if they do not contradict each other, else "different".

First response: {response}
Second response: {original}
"""
"""Our own wording; figures depend on it, so comparisons with papers need their prompts."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one figure of a set."""

    category: Category
    subcategory: str
    set_id: str
    figure_id: str
    number: str
    """Of the question in its set."""
    visual_input: int
    """0: no figure; 1: an original one, or one as common sense has it; 2: one that is not."""
    text: str
    label: bool
    """Whether yes is right."""
    gold: str
    """The reference answer as a sentence, for a judge."""

    @property
    def set_name(self) -> str:
        """The set, within which questions are no independent evidence."""
        return "/".join((self.category, self.subcategory, self.set_id))

    @property
    def group(self) -> str:
        """The question, whatever the figure."""
        return f"{self.set_name}/question {self.number}"

    @property
    def figure(self) -> str:
        return f"{self.set_name}/{self.figure_id}"

    @property
    def question_id(self) -> str:
        return f"{self.figure}/{self.number}"

    @property
    def has_no_figure(self) -> bool:
        return self.category == "VS" and self.figure_id == "0"

    @property
    def image(self) -> Path | None:
        """The published file; None where none is shown."""
        if self.visual_input == 0:
            return None
        return Path(self.category) / self.subcategory / f"{self.set_id}_{self.figure_id}.png"


@dataclass(frozen=True, kw_only=True)
class JudgedResponse:
    """A response and what was made of it."""

    question: Question
    response: str
    judged: int
    """`WRONG`, `RIGHT` or `UNCLEAR`."""
    same: bool
    """Whether it says what was said about figure 0."""

    @property
    def is_right(self) -> bool:
        return self.judged == RIGHT or (self.judged == UNCLEAR and self.question.has_no_figure)

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        return {
            "question_id": self.question.question_id,
            "question": self.question.text,
            "label": "yes" if self.question.label else "no",
            "answer": self.response,
            "judged": ("wrong", "right", "unclear")[self.judged],
            "counts_as_right": self.is_right,
            "same_as_original": self.same,
        }


def parse_correctness(reply: str) -> int:
    """What a judge says: `incorrect` is looked for first, then `correct`; else it is unclear."""
    said = reply.lower()
    if "incorrect" in said:
        return WRONG
    return RIGHT if "correct" in said else UNCLEAR


def parse_same(reply: str) -> bool:
    """Whether a judge says `same`."""
    return "same" in reply.lower()


def read_yes_no(response: str, label: bool) -> int:
    """The stand-in for a judge: the first sentence's yes or no held against the truth."""
    said = says(response)
    if said is None:
        return UNCLEAR
    return RIGHT if (said == "yes") == label else WRONG


def read_items(path: Path) -> list[tuple[Question, Mapping[str, Any]]]:
    """The questions of the published file, each with its item as it stands there.

    Raises:
        DataError: an item lacks a key or has an impossible value, a question is there twice, or is
            asked about a changed figure and not about the original one.
    """
    found: list[tuple[Question, Mapping[str, Any]]] = []
    for number, row in enumerate(read_objects(path), start=1):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise DataError(
                f"{path}: item {number} has no {', '.join(missing)} (keys: {', '.join(row)})"
            )
        category, visual, label = (str(row[k]) for k in ("category", "visual_input", "gt_answer"))
        for key, value, allowed in (
            ("category", category, ("VD", "VS")),
            ("visual_input", visual, ("0", "1", "2")),
            ("gt_answer", label, ("0", "1")),
        ):
            if value not in allowed:
                raise DataError(
                    f"{path}: item {number}: {key} must be {', '.join(allowed)}, got "
                    f"{shortly(row[key])}"
                )
        question = Question(
            category="VD" if category == "VD" else "VS",
            subcategory=str(row["subcategory"]),
            set_id=str(row["set_id"]),
            figure_id=str(row["figure_id"]),
            number=str(row["question_id"]),
            visual_input=int(visual),
            text=str(row["question"]),
            label=label == "1",
            gold=str(row.get("gt_answer_details") or ("Yes." if label == "1" else "No.")),
        )
        found.append((question, row))
    refuse_repeated([question.question_id for question, _ in found], path)
    originals = {question.group for question, _ in found if question.figure_id == "0"}
    alone = [q.question_id for q, _ in found if q.group not in originals]
    if alone:
        raise DataError(
            f"{path}: {len(alone)} questions are asked about a changed figure and not about figure "
            f"0 of their set, for example {', '.join(alone[:5])}; give all figures"
        )
    return found


def judged_in_file(row: Mapping[str, Any], key: str, *, place: str) -> int:
    """A judgement that a published file holds: 0 wrong, 1 right, 2 unclear.

    Raises:
        DataError: it holds none, or another value.
    """
    value = str(row.get(key))
    if value not in ("0", "1", "2"):
        raise DataError(
            f"{place}: {key} must be 0 (wrong), 1 (right) or 2 (unclear), got "
            f"{shortly(row.get(key))}"
        )
    return int(value)


def blame(item: JudgedResponse, original: int) -> tuple[bool, bool]:
    """Whether the language model's beliefs and whether its sight are to blame for a response.

    Args:
        item: the response.
        original: how the response to the same question about figure 0 was judged.
    """
    question, judged = item.question, item.judged
    if question.figure_id == "0":
        if question.category == "VD":
            return False, judged != RIGHT
        return judged == WRONG, False
    if judged == RIGHT:
        return False, False
    if question.category == "VD":
        return original == RIGHT and judged == WRONG and item.same, True
    if original == WRONG:
        return True, judged == UNCLEAR or not item.same
    if original == RIGHT and judged == WRONG and question.visual_input == _HARD and item.same:
        return True, False
    return False, True


COUNTS = (
    "questions",
    "right",
    "unclear",
    "groups",
    "groups_right",
    "figures",
    "figures_right",
    "figures_wrong",
    "figures_mixed",
    "easy",
    "easy_right",
    "hard",
    "hard_right",
    "truly_yes",
    "taken_for_yes",
    "wrong",
    "wrong_and_truly_no",
    "language_hallucinations",
    "visual_illusions",
    "mixed_causes",
    "words",
)


def tally(judged: Sequence[JudgedResponse], sets: Sequence[str]) -> Tally:
    """Counts, shape [sets], by the names of `COUNTS`.

    Args:
        judged: of every question of the sets, that about figure 0 included.
        sets: the clusters.
    """
    places = {name: place for place, name in enumerate(sets)}
    counts = {name: np.zeros(len(sets)) for name in COUNTS}
    original = {i.question.group: i.judged for i in judged if i.question.figure_id == "0"}

    def add(name: str, item: JudgedResponse, value: float = 1) -> None:
        counts[name][places[item.question.set_name]] += value

    for item in judged:
        add("questions", item)
        add("right", item, item.is_right)
        add("unclear", item, item.judged == UNCLEAR)
        add("truly_yes", item, item.question.label)
        add("taken_for_yes", item, item.is_right == item.question.label)
        add("wrong", item, not item.is_right)
        add("wrong_and_truly_no", item, not item.is_right and not item.question.label)
        add("words", item, len(item.response.split()))
    for items in _by(judged, lambda item: item.question.group):
        beliefs, sight = zip(*(blame(i, original[i.question.group]) for i in items), strict=True)
        add("groups", items[0])
        add("groups_right", items[0], all(item.is_right for item in items))
        add("language_hallucinations", items[0], any(beliefs) and not any(sight))
        add("visual_illusions", items[0], any(sight) and not any(beliefs))
        add("mixed_causes", items[0], any(sight) and any(beliefs))
        for name, part in (
            ("easy", [i for i in items if i.question.visual_input != _HARD]),
            ("hard", [i for i in items if i.question.visual_input == _HARD]),
        ):
            add(name, items[0], bool(part))
            add(f"{name}_right", items[0], bool(part) and all(item.is_right for item in part))
    shown = [item for item in judged if not item.question.has_no_figure]
    for items in _by(shown, lambda item: item.question.figure):
        right = sum(item.is_right for item in items)
        state = "right" if right == len(items) else "mixed" if right else "wrong"
        add("figures", items[0])
        add(f"figures_{state}", items[0])
    return counts


def _by(items: Sequence[JudgedResponse], key: Any) -> list[list[JudgedResponse]]:
    groups: dict[str, list[JudgedResponse]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _share(label: str, part: str, whole: str) -> Measure:
    return Measure(label, "percent", lambda t: 100 * ratio(t[part], t[whole]))


_WRONG_GROUPS = "of the questions not right throughout"
MEASURES: Mapping[str, Measure] = {
    "accuracy": _share("aAcc, responses right", "right", "questions"),
    "question_accuracy": _share("qAcc, right for all figures", "groups_right", "groups"),
    "figure_accuracy": _share("fAcc, figures all right", "figures_right", "figures"),
    "easy_accuracy": _share("easy questions right", "easy_right", "easy"),
    "hard_accuracy": _share("hard questions right", "hard_right", "hard"),
    "unclear_ratio": _share("unclear responses", "unclear", "questions"),
    "yes_difference": Measure(
        "yes, above its true share",
        "difference",
        lambda t: 100 * ratio(t["taken_for_yes"] - t["truly_yes"], t["questions"]),
    ),
    "false_positive_ratio": _share(
        "of the wrong, those that say yes", "wrong_and_truly_no", "wrong"
    ),
    "language_hallucination": Measure(
        f"LH, beliefs, {_WRONG_GROUPS}",
        "percent",
        lambda t: 100 * ratio(t["language_hallucinations"], t["groups"] - t["groups_right"]),
    ),
    "visual_illusion": Measure(
        "VI, sight, likewise",
        "percent",
        lambda t: 100 * ratio(t["visual_illusions"], t["groups"] - t["groups_right"]),
    ),
    "mixed": Measure(
        "both, likewise",
        "percent",
        lambda t: 100 * ratio(t["mixed_causes"], t["groups"] - t["groups_right"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["questions"])
    ),
}
