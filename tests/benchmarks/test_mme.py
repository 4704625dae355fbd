"""MME: the published example, and files in both published layouts."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign import config
from diffalign.benchmarks.mme.config import MME
from diffalign.benchmarks.mme.rules import parse_response, read_questions, read_responses
from diffalign.errors import ConfigError, DataError

EXAMPLE = (
    ("a", "Yes", "yes", "No", "No."),
    ("b", "Yes", "Yes, it is", "No", "Yes"),
    ("c", "Yes", "The answer is yes", "No", "nothing"),
    ("d", "Yes", " yes", "No", "I do not"),
)
"""Image, then truth and response of both questions; executed by the authors' calculation.py."""


def lines(example=EXAMPLE) -> str:
    return "".join(
        f"{image}.jpg\tIs there a dog?\t{first}\t{one}\n{image}.jpg\tA cat?\t{second}\t{two}\n"
        for image, first, one, second, two in example
    )


def evaluated(*settings: str):
    return config.load(MME, None, [*settings, "bootstrap.resamples=100"]).report()


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("The answer is yes", None),
        ("nothing", "no"),
        ("Now, yes", "no"),
        (" yes", "yes"),
        ("I do not", None),
        ("", None),
    ],
)
def test_four_characters_are_read(response, said):
    assert parse_response(response) == said


def test_the_published_example_gives_the_published_figures(tmp_path):
    (tmp_path / "existence.txt").write_text(lines())
    report = evaluated(f"responses={tmp_path}", "tasks=[existence]")
    values = {name: figure.value for name, figure in report.whole.figures.items()}
    assert values == pytest.approx(
        {
            "accuracy": 62.5,
            "accuracy_plus": 25,
            "score": 87.5,
            "precision": 75,
            "recall": 100,
            "neither_ratio": 25,
            "mean_length": (1 + 1 + 3 + 1 + 4 + 1 + 1 + 3) / 8,
            "total_score": 87.5,
        }
    )
    counts = report.whole.counts
    positives = ("true_positives", "false_negatives", "true_negatives", "false_positives")
    assert [counts[name] for name in positives] == [3, 0, 2, 1]
    assert (
        "2 of 8 responses hold neither yes nor no in their first four characters"
        in (report.notes[0])
    )


def test_scores_of_tasks_add_up_and_other_figures_are_means(tmp_path):
    (tmp_path / "existence.txt").write_text(lines())
    (tmp_path / "count.txt").write_text(lines([("a", "Yes", "Yes", "No", "No")]))
    report = evaluated(f"responses={tmp_path}", "tasks=[existence, count]")
    figures = report.whole.figures
    assert figures["total_score"].value == 87.5 + 200
    assert figures["score"].value == (87.5 + 200) / 2
    assert report.parts["count"].figures["accuracy_plus"].value == 100
    assert report.whole.clusters == 4  # image a is one cluster of both tasks


def test_a_line_too_many_is_said_and_shifts_nothing(tmp_path):
    (tmp_path / "color.txt").write_text(lines()[lines().index("\n") + 1 :])
    with pytest.raises(DataError, match=r"lines 1 and 2 must be the two .*a.jpg and b.jpg;"):
        read_responses(tmp_path, ["color"])
    (tmp_path / "color.txt").write_text(lines() + "e.jpg\tA cow?\tYes\tYes\n")
    with pytest.raises(DataError, match=r"lines 9 and 10 .* about e.jpg alone"):
        read_responses(tmp_path, ["color"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg\tQ?\tYes", "line 1 has 3 fields, and needs image, question, truth and response"),
        ("a.jpg\tQ?", "line 1 has 2 fields"),
        ("a.jpg\tQ?\tMaybe\tYes", "line 1: the truth must be Yes or No, got 'Maybe'"),
    ],
)
def test_lines_of_another_form_are_refused(tmp_path, line, message):
    (tmp_path / "color.txt").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_responses(tmp_path, ["color"])


def test_a_task_without_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no file of the task count"):
        read_responses(tmp_path, ["count"])


def published(folder):
    """As released: one task next to its images, one with folders of both."""
    for place in (folder / "color", folder / "artwork" / "questions_answers_YN"):
        place.mkdir(parents=True)
        (place / "0001.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    (folder / "color" / "0001.png").write_bytes(b"")
    (folder / "artwork" / "images").mkdir()
    (folder / "artwork" / "images" / "0001.jpg").write_bytes(b"")
    return folder


def test_the_released_layout_is_asked_about_its_own_images(tmp_path):
    folder = published(tmp_path)
    questions = read_questions(folder, ["color", "artwork"])
    assert [(q.task, q.image, q.label) for q in questions] == [
        ("color", "0001.png", "yes"),
        ("color", "0001.png", "no"),
        ("artwork", "0001.jpg", "yes"),
        ("artwork", "0001.jpg", "no"),
    ]
    settings = [
        f"questions={folder}",
        "tasks=[color, artwork]",
        *("model.kind=tests.judges.brightness_teller", f"asking.images={folder}"),
        f"asking.saves={folder / 'kept.jsonl'}",
    ]
    asked = config.load(MME, None, settings).asked()
    assert asked is not None
    names = [q.image.relative_to(folder).as_posix() for q in asked.questions if q.image]
    assert names == ["color/0001.png"] * 2 + ["artwork/images/0001.jpg"] * 2


SERVED = "asking.endpoint={address: 'http://a/v1', model: tiny}"


def test_a_served_model_is_asked_the_same_questions(tmp_path):
    folder = published(tmp_path)
    saves = [f"asking.images={folder}", f"asking.saves={folder / 'kept.jsonl'}"]
    settings = [f"questions={folder}", "tasks=[color]", *saves, "asking.engine=endpoint", SERVED]
    asked = config.load(MME, None, settings).asked()
    assert asked is not None and asked.model is None
    assert [q.question_id for q in asked.questions] == [
        q.question_id for q in read_questions(folder, ["color"])
    ]
    with pytest.raises(ConfigError, match="questions and model go together"):
        config.load(MME, None, settings[1:])


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks must be some of existence, .* got colour"):
        evaluated(f"responses={tmp_path}", "tasks=[colour]")


def test_a_model_is_asked_and_counted(tmp_path):
    from PIL import Image

    for name, grey in (("a", 255), ("b", 0)):
        Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "existence.txt").write_text(lines([(n, "Yes", "", "No", "") for n in "ab"]))
    report = evaluated(
        f"questions={tmp_path}",
        "tasks=[existence]",
        *("model.kind=tests.judges.brightness_teller", f"asking.images={tmp_path}"),
        f"asking.saves={tmp_path / 'kept.jsonl'}",
    )
    # "a light" of the bright image is neither; "no light" of the dark one is a no
    assert report.whole.counts["neither_yes_nor_no"] == 2
    assert report.whole.figures["accuracy"].value == 25
