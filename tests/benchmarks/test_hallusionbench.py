"""HallusionBench: the published example, and which responses, files and judgements count how."""

from __future__ import annotations

import json

import pytest

from diffalign import config
from diffalign.benchmarks.hallusionbench.config import HallusionBench
from diffalign.benchmarks.hallusionbench.rules import (
    JudgedResponse,
    Question,
    blame,
    parse_correctness,
    parse_same,
    read_items,
    read_yes_no,
)
from diffalign.errors import ConfigError, DataError
from tests.judges.chat_server import serving

COLUMNS = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
EXAMPLE = (
    (("VD", "illusion", 0, 0, 0, 1), 1, 1, 1),
    (("VD", "illusion", 0, 1, 0, 2), 0, 0, 1),
    (("VD", "illusion", 0, 0, 1, 1), 0, 1, 1),
    (("VD", "illusion", 0, 1, 1, 2), 1, 2, 0),
    (("VS", "chart", 0, 0, 0, 0), 1, 2, 1),
    (("VS", "chart", 0, 1, 0, 1), 1, 1, 1),
)
"""Place, truth, judgement, and whether it is the same response; executed by the authors' code."""


def rows(example=EXAMPLE, **more) -> list[dict[str, object]]:
    return [
        {
            **dict(zip(COLUMNS, map(str, place), strict=True)),
            "question": "Is it so?",
            "gt_answer": str(label),
            "gt_answer_details": "It is." if label else "It is not.",
            "model_prediction": "Yes, it is.",
            "gpt_check": str(judged),
            "same": str(same),
            **more,
        }
        for place, label, judged, same in example
    ]


def written(folder, content) -> str:
    path = folder / "HallusionBench.json"
    path.write_text(json.dumps(content))
    return str(path)


def evaluated(*settings: str):
    few = "bootstrap.resamples=100"
    return config.load(HallusionBench, None, [*settings, few]).report()


def values(report) -> dict[str, float | None]:
    return {name: figure.value for name, figure in report.whole.figures.items()}


def test_the_published_example_gives_the_published_figures(tmp_path):
    report = evaluated(f"responses={written(tmp_path, rows())}", "correctness=gpt_check")
    figures = values(report)
    assert [figures[n] for n in ("accuracy", "question_accuracy", "figure_accuracy")] == (
        pytest.approx([66.6667, 33.3333, 66.6667], abs=1e-4)
    )
    assert (figures["yes_difference"], figures["false_positive_ratio"]) == (0, 50)
    counts = report.whole.counts
    assert (counts["easy_right"], counts["easy"]) == (3, 3)
    assert (counts["hard_right"], counts["hard"]) == (0, 2)
    assert [counts[f"figures_{kind}"] for kind in ("right", "wrong", "mixed")] == [2, 1, 0]
    causes = ("visual_illusions", "mixed_causes", "language_hallucinations")
    assert [counts[name] for name in causes] == [1, 1, 0]
    assert [row["counts_as_right"] for row in report.details] == [1, 0, 1, 0, 1, 1]
    assert set(report.parts) == {"VD", "VS"}


def test_shares_of_nothing_are_undefined_where_the_published_code_divides_by_zero(tmp_path):
    right = [(place, label, 1, same) for place, label, _, same in EXAMPLE]
    report = evaluated(f"responses={written(tmp_path, rows(right))}", "correctness=gpt_check")
    undefined = {name for name, value in values(report).items() if value is None}
    assert undefined == {
        *("false_positive_ratio", "language_hallucination", "visual_illusion", "mixed")
    }


def test_a_bias_towards_no_is_negative_and_so_may_be_its_interval(tmp_path):
    sets = [
        (("VD", "map", number, 0, 0, 1), 1, int(number > 5), 1) for number in range(12)
    ]  # half of the truths are yes and were taken for no
    report = evaluated(f"responses={written(tmp_path, rows(sets))}", "correctness=gpt_check")
    figure = report.whole.figures["yes_difference"]
    assert figure.value == -50
    assert figure.interval is not None and figure.interval.low < -50 < figure.interval.high < 0


@pytest.mark.parametrize(
    ("reply", "judged"),
    [("Correct.", 1), ("That is incorrect", 0), ("unclear", 2), ("INCORRECT, not correct", 0)],
)
def test_incorrect_is_looked_for_first(reply, judged):
    assert parse_correctness(reply) == judged


def test_same_is_looked_for_anywhere():
    assert parse_same("The SAME.") and not parse_same("different")


@pytest.mark.parametrize(
    ("response", "label", "judged"),
    [("Yes, it is.", True, 1), ("No.", True, 0), ("no", False, 1), ("Perhaps", False, 2)],
)
def test_without_a_judge_yes_and_no_are_read(response, label, judged):
    assert read_yes_no(response, label) == judged


def question(category: str, figure: str, visual: int) -> Question:
    return Question(
        category=category,
        subcategory="x",
        set_id="0",
        figure_id=figure,
        number="0",
        visual_input=visual,
        text="?",
        label=True,
        gold="Yes.",
    )


@pytest.mark.parametrize(
    ("category", "figure", "visual", "judged", "same", "original", "found"),
    [
        ("VD", "0", 1, 2, True, 2, (False, True)),
        ("VS", "0", 0, 0, True, 0, (True, False)),
        ("VS", "0", 0, 2, True, 2, (False, False)),
        ("VD", "1", 2, 0, True, 1, (True, True)),
        ("VD", "1", 2, 0, False, 1, (False, True)),
        ("VD", "1", 2, 2, True, 1, (False, True)),
        ("VD", "1", 2, 0, True, 0, (False, True)),
        ("VS", "1", 1, 0, True, 0, (True, False)),
        ("VS", "1", 1, 0, False, 0, (True, True)),
        ("VS", "1", 1, 2, True, 0, (True, True)),
        ("VS", "1", 1, 0, True, 2, (False, True)),
        ("VS", "1", 1, 0, True, 1, (False, True)),
        ("VS", "1", 2, 0, True, 1, (True, False)),
        ("VS", "1", 2, 0, False, 1, (False, True)),
        ("VS", "1", 2, 1, True, 0, (False, False)),
    ],
)
def test_who_is_to_blame(category, figure, visual, judged, same, original, found):
    item = JudgedResponse(
        question=question(category, figure, visual), response="", judged=judged, same=same
    )
    assert blame(item, original) == found


def test_a_judge_is_asked_about_each_response_and_about_changed_figures_again(tmp_path):
    asked = []

    def reply(prompt: str) -> str:
        asked.append(prompt)
        return "different" if "Second response" in prompt else "incorrect"

    path = written(tmp_path, rows())
    with serving(reply) as server:
        report = evaluated(
            f"responses={path}",
            *("judge.kind=endpoint", f"judge.address={server.address}", "judge.model=tiny"),
            f"verdicts={tmp_path / 'verdicts.jsonl'}",
        )
    assert values(report)["accuracy"] == 0
    assert sum("Second response" in prompt for prompt in asked) == 3
    assert any("It is not." in prompt for prompt in asked)


def test_figures_without_a_judge_say_so(tmp_path):
    report = evaluated(f"responses={written(tmp_path, rows())}")
    assert values(report)["accuracy"] == pytest.approx(100 * 4 / 6)  # who says yes to everything
    assert "Without a judge the figures are not those of papers." in report.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1].pop("gt_answer"), "item 2 has no gt_answer"),
        (lambda r: r[0].update(visual_input="3"), "item 1: visual_input must be 0, 1, 2, got '3'"),
        (lambda r: r.pop(0), "1 questions are asked about a changed figure and not about figure 0"),
        (lambda r: r.append(r[0]), "1 question_ids stand more than once.*VD/illusion/0/0/0"),
    ],
)
def test_files_that_cannot_be_counted_are_refused(tmp_path, change, message):
    content = rows()
    change(content)
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_items(path)


def test_questions_without_a_response_are_refused(tmp_path):
    content = rows()
    del content[3]["model_prediction"]
    with pytest.raises(DataError, match="1 of 6 questions have no response, for example VD/illus"):
        evaluated(f"responses={written(tmp_path, content)}")


def test_a_judgement_that_is_none_is_refused(tmp_path):
    path = written(tmp_path, rows(gpt_check="maybe"))
    with pytest.raises(DataError, match=r"VD/illusion/0/0/0: gpt_check must be 0 .*'maybe'"):
        evaluated(f"responses={path}", "correctness=gpt_check")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["responses=a", "questions=b"], "questions and model go together"),
        (["responses=a", "verdicts=b"], "judge and verdicts go together"),
        (["correctness=x"], "give either responses=FILE"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluated(*settings)


@pytest.mark.parametrize(
    "who",
    [
        ["model.kind=tests.judges.brightness_teller"],
        ["asking.engine=endpoint", "asking.endpoint={address: 'http://a/v1', model: tiny}"],
    ],
)
def test_questions_without_a_figure_are_asked_without_an_image(tmp_path, who):
    settings = [
        f"questions={written(tmp_path, rows())}",
        *(*who, f"asking.images={tmp_path}"),
        f"asking.saves={tmp_path / 'kept.jsonl'}",
    ]
    asked = config.load(HallusionBench, None, settings).asked()
    assert asked is not None
    images = {q.question_id: q.image for q in asked.questions}
    assert images["VS/chart/0/0/0"] is None
    assert images["VD/illusion/0/1/0"] == tmp_path / "VD" / "illusion" / "0_1.png"
