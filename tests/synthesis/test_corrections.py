from __future__ import annotations

import json

import pytest

from diffalign.errors import DataError
from diffalign.synthesis.corrections import (
    judge_prompt,
    parse_correction,
    read_corrections,
    read_scores,
)


def test_corrections_are_found_by_id_and_sample(tmp_path):
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"id": "a", "revised": "x"}\n{"id": "a", "sample": 1, "revised": "y"}\n')
    found = read_corrections(path)
    assert {key: some.revised for key, some in found.items()} == {("a", 0): "x", ("a", 1): "y"}


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a"}',
        "3",
        '{"revised": "x"}',
        '{"id": "a", "revised": null}',
        '{"id": "a", "revised": " "}',
        '{"id": "a", "revised": "x", "sample": "first"}',
        '{"id": "a", "revised": "x", "report": "fine"}',
    ],
)
def test_a_line_without_what_it_needs_is_named(tmp_path, line):
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"id": "b", "revised": "x"}\n' + line)
    with pytest.raises(DataError, match="line 2 must have id, revised"):
        read_corrections(path)


@pytest.mark.parametrize("score", ["null", "NaN", '"good"'])
def test_a_score_that_is_no_number_is_named(tmp_path, score):
    path = tmp_path / "scores.jsonl"
    path.write_text(f'{{"id": "a", "sample": 1, "score": {score}}}')
    with pytest.raises(DataError, match="line 1 must have id, score"):
        read_scores(path)


def test_a_second_line_about_an_response_is_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": "a", "score": 1}\n{"id": "a", "sample": 0, "score": 2}\n')
    with pytest.raises(DataError, match="line 2 is the second about a, sample 0"):
        read_scores(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_scores(tmp_path / "none.jsonl")


def test_a_reply_becomes_the_rewritten_sentences_in_order():
    report = {
        "Added": {"rewritten_content": "It barks."},
        "1": {"copied_content": "It flies.", "score": 1, "rewritten_content": "It runs."},
        "0": {"copied_content": "A dog.", "score": 4, "rewritten_content": "A dog."},
    }
    found = parse_correction(f"Here you are:\n```json\n{json.dumps(report)}\n```")
    assert found.revised == "A dog. It runs. It barks."
    assert found.report == report


@pytest.mark.parametrize(
    "reply",
    ["", "no JSON", "{}", '{"Added": {"rewritten_content": "x"}}', '{"0": "A dog.", "1": ["x"]}'],
)
def test_a_reply_without_sentences_is_unreadable(reply):
    with pytest.raises(ValueError):
        parse_correction(reply)


def test_a_prompt_is_filled_once():
    prompt = judge_prompt("what is {response}?", "a dog", "a {reference}")
    assert "Question: what is {response}?" in prompt
    assert prompt.endswith("Answer of the model: a {reference}")
