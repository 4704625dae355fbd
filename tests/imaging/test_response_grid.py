from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.imaging.grid import MUTED
from diffalign.imaging.response_grid import WRONG, Passage, Response, ResponseRow, render_responses

IMAGE = Image.new("RGB", (64, 64), (0, 0, 255))


def response(*passages: tuple[str, bool], note: str = "") -> Response:
    return Response(
        passages=[Passage(text=text, wrong=wrong) for text, wrong in passages], note=note
    )


def rendered(*responses: Response) -> np.ndarray:
    row = ResponseRow(image=IMAGE, responses=responses)
    names = [f"model {i}" for i in range(len(responses))]
    return np.asarray(render_responses([row], names))


def columns_of(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.unique(np.argwhere((image == colour).all(axis=2))[:, 1])


def test_only_what_is_wrong_is_marked_and_under_the_model_that_said_it():
    right, wrong = response(("A cat.", False)), response(("A cat.", False), ("A dog.", True))
    assert not columns_of(rendered(right, right), WRONG).size
    first = columns_of(rendered(wrong, right), WRONG)
    second = columns_of(rendered(right, wrong), WRONG)
    assert first.size and np.array_equal(second - first, np.full(first.size, second[0] - first[0]))
    assert second[0] - first[0] > 300


def test_long_responses_stay_within_their_column_and_make_the_row_higher():
    short, long = response(("word", True)), response((" ".join(["word"] * 80), True))
    unbroken = response(("W" * 200, True))
    right_edge = columns_of(rendered(short, response(("x", False))), MUTED).max()
    for text in (long, unbroken):
        image = rendered(text, response(("x", False)))
        assert image.shape[0] > rendered(short, short).shape[0]
        assert columns_of(image, WRONG).max() < right_edge
    assert (rendered(short) == (0, 0, 255)).all(axis=2).sum() == 128 * 128


def test_a_note_is_muted():
    plain, noted = (
        rendered(response(("A cat.", False))),
        rendered(response(("A cat.", False), note="no dog")),
    )
    assert (noted == MUTED).all(axis=2).sum() > (plain == MUTED).all(axis=2).sum()


def test_rows_and_columns_must_fit():
    with pytest.raises(ValueError, match="row 0 has 1 responses for 2 columns"):
        render_responses([ResponseRow(image=IMAGE, responses=[response(("x", False))])], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        render_responses([], ["a"])
