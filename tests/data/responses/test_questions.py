from __future__ import annotations

import json

import pytest

from diffalign.data.responses.questions import Question, QuestionConfig, Unmade, open_questions
from diffalign.errors import ConfigError, DataError


def opened(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_questions(QuestionConfig(path=str(path), **settings))


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "prompt": "Why?", "answer": "So."},
        {"images": ["a.png"], "prompt": "<image>\nWhy?", "answer": "So."},
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhy?"},
                {"from": "gpt", "value": "So."},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": "Later."},
            ],
        },
        {"image": "a.png", "question": "Why?", "chosen": "So.", "rejected": "No."},
    ],
    ids=["plain", "list", "llava", "rlaif_v"],
)
def test_every_form_gives_the_first_question_and_its_response(tmp_path, row):
    (question,) = opened(tmp_path, row)
    assert question.images == (tmp_path / "a.png",)
    assert [turn.text for turn in question.turns] == ["<image>\nWhy?"]
    assert (question.text, question.response) == ("Why?", "So.")
    assert question.sample_id == "rows.jsonl:1"


def test_a_question_may_have_no_response(tmp_path):
    (question,) = opened(tmp_path, {"image": "a.png", "prompt": "Why?"})
    assert isinstance(question, Question) and question.response is None


def test_other_columns_can_be_named(tmp_path):
    row = {"file": "a.png", "text": "Why?", "caption": "So."}
    names = {"image": "file", "prompt": "text", "answer": "caption"}
    (question,) = opened(tmp_path, row, kind="plain", columns=names)
    assert (question.images, question.response) == ((tmp_path / "a.png",), "So.")


def test_a_bad_row_is_kept_with_its_reason(tmp_path):
    good = {"image": "a.png", "prompt": "Why?", "answer": "So."}
    bad = {"image": "a.png", "prompt": "<image> and <image>?", "answer": "So."}
    first, second = opened(tmp_path, good, bad)
    assert isinstance(first, Question)
    assert isinstance(second, Unmade) and "2 <image>" in second.detail


def test_a_limit_leaves_out_the_rest(tmp_path):
    rows = [{"image": "a.png", "prompt": f"{n}?", "answer": "So."} for n in range(3)]
    questions = opened(tmp_path, *rows, limit=2)
    assert [question.text for question in questions] == ["0?", "1?"]
    assert [question.text for question in questions[1:9]] == ["1?"]


def test_columns_that_fit_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"columns picture, caption fit(.|\n)*questions\.col"):
        opened(tmp_path, {"picture": "a.png", "caption": "x"})


def test_an_image_under_another_name_is_not_passed_over(tmp_path):
    with pytest.raises(ConfigError, match=r"questions\.columns='\{image: picture\}'"):
        opened(tmp_path, {"picture": "a.png", "prompt": "Why?"})
