from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.imaging.grid import MUTED
from diffalign.imaging.response_grid import WRONG, Answer, AnswerRow, Passage, draw_answers

PICTURE = Image.new("RGB", (64, 64), (0, 0, 255))


def answer(*passages: tuple[str, bool], note: str = "") -> Answer:
    return Answer(passages=[Passage(text=text, wrong=wrong) for text, wrong in passages], note=note)


def drawn(*answers: Answer) -> np.ndarray:
    row = AnswerRow(picture=PICTURE, answers=answers)
    names = [f"model {i}" for i in range(len(answers))]
    return np.asarray(draw_answers([row], names))


def columns_of(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.unique(np.argwhere((picture == colour).all(axis=2))[:, 1])


def test_only_what_is_wrong_is_marked_and_under_the_model_that_said_it():
    right, wrong = answer(("A cat.", False)), answer(("A cat.", False), ("A dog.", True))
    assert not columns_of(drawn(right, right), WRONG).size
    first = columns_of(drawn(wrong, right), WRONG)
    second = columns_of(drawn(right, wrong), WRONG)
    assert first.size and np.array_equal(second - first, np.full(first.size, second[0] - first[0]))
    assert second[0] - first[0] > 300


def test_long_answers_stay_within_their_column_and_make_the_row_higher():
    short, long = answer(("word", True)), answer((" ".join(["word"] * 80), True))
    unbroken = answer(("W" * 200, True))
    right_edge = columns_of(drawn(short, answer(("x", False))), MUTED).max()
    for text in (long, unbroken):
        picture = drawn(text, answer(("x", False)))
        assert picture.shape[0] > drawn(short, short).shape[0]
        assert columns_of(picture, WRONG).max() < right_edge
    assert (drawn(short) == (0, 0, 255)).all(axis=2).sum() == 128 * 128


def test_a_note_is_muted():
    plain, noted = drawn(answer(("A cat.", False))), drawn(answer(("A cat.", False), note="no dog"))
    assert (noted == MUTED).all(axis=2).sum() > (plain == MUTED).all(axis=2).sum()


def test_rows_and_columns_must_fit():
    with pytest.raises(ValueError, match="row 0 has 1 answers for 2 columns"):
        draw_answers([AnswerRow(picture=PICTURE, answers=[answer(("x", False))])], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        draw_answers([], ["a"])
