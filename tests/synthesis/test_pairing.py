"""Pairs of judged responses: RLAIF-V's rule."""

from __future__ import annotations

import json

import pytest

from diffalign.errors import DataError
from diffalign.synthesis.pairing import (
    judge_prompt,
    length_bound,
    length_excess,
    parse_correction,
    read_corrections,
    read_scores,
    scored_pairs,
)


def test_pairs_need_a_gap_and_the_widest_come_first():
    found = scored_pairs(["a", "b", "c"], [-1.0, 0.0, -3.0], min_gap=1.0)
    assert found == [("b", "c"), ("a", "c"), ("b", "a")]
    assert scored_pairs(["a", "b", "c"], [-1.0, 0.0, -3.0], min_gap=2.5) == [("b", "c")]


def test_equal_scores_make_no_pair_at_any_gap():
    assert scored_pairs(["a", "b"], [1.0, 1.0], min_gap=0.0) == []


def test_excess_is_a_share_of_the_rejected_length():
    assert length_excess("one two", "one two three four") == pytest.approx((4 - 2) / 4)
    assert length_excess("one two three", "one") == pytest.approx((1 - 3) / 1)


def test_the_bound_equalises_mean_lengths():
    pairs = [
        ("a", "a b"),  # excess 1 / 2
        ("a b c d", "a b c"),  # excess -1 / 3
        ("a", "a b c d e f g h i j"),  # excess 9 / 10
    ]
    # with all three the rejected side is 3 words longer on average; without the last, 0
    bound = length_bound(pairs)
    assert bound == 0.88
    assert [length_excess(*pair) <= bound for pair in pairs] == [True, True, False]


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
