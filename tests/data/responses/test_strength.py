"""How sure pairs of responses are: from the scores of a form to the batch."""

from __future__ import annotations

import re

import pytest

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.reading import open_responses
from diffalign.data.skipping import LeftOut, Skipped
from diffalign.data.strength.base import Strength
from diffalign.data.strength.gap import Gap
from diffalign.data.strength.given import Given
from diffalign.data.strength.settings import StrengthConfig
from diffalign.data.strength.votes import Votes
from diffalign.errors import DataError
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import rated, write_lines

GAP = StrengthConfig(preference=Gap(temperature=1.0))


def opened(folder, *rows, **settings):
    config = ResponseConfig(path=str(write_lines(folder, rows)), **settings)
    return open_responses(config, strength=config.strength, keep_ties=config.ties == "keep")


def trl(chosen, rejected, names=("score_chosen", "score_rejected")):
    row = {"image": "0.png", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    return row | dict(zip(names, (chosen, rejected), strict=True))


def test_ratings_of_vlfeedback_are_scores(tmp_path):
    row = forms.vlfeedback(0)
    row["completions"] = [
        rated("best", "5", "5", "5"),
        rated("good", "5", "4", "3"),
        rated("as good", "4", "4", "4"),
    ]
    data = opened(tmp_path, row, strength=GAP, ties="keep")
    (found,) = data.without_images()
    assert [each.scores for each in found] == [(5.0, 4.0), (5.0, 4.0), (4.0, 4.0)]
    sure = [data.pair(0, place).strength.preference for place in range(3)]
    assert sure == pytest.approx([0.731058578630, 0.731058578630, 0.5])


def test_ties_that_are_kept_are_half_a_preference_next_to_certain_ones(tmp_path):
    row = forms.vlfeedback(0)
    row["completions"] = [rated("a", "4", "4", "4"), rated("b", "5", "4", "3")]
    assert next(opened(tmp_path, row).without_images()) == [LeftOut.TIE]
    data = opened(tmp_path, row, ties="keep")
    assert data.pair(0, 0).strength == Strength(preference=0.5)


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("votes_chosen", "votes_rejected"),
    ],
)
def test_scores_next_to_chosen_and_rejected_are_read(names, tmp_path):
    data = opened(tmp_path, trl(3, 1, names), strength=StrengthConfig(preference=Votes()))
    assert data.pair(0, 0).strength.parts() == {"preference": pytest.approx(2 / 3)}
    assert "its probability is the mean of Beta(1, 1) after votes" in data.summary


def test_further_columns_make_margins(tmp_path):
    strength = StrengthConfig(
        preference=Given(of="p"),
        margin={"length": 0.1},
        columns={"p": "sure", "length": "words_chosen, words_rejected"},
    )
    row = trl(7, 9, ("words_chosen", "words_rejected")) | {"sure": 0.8}
    found = opened(tmp_path, row, strength=strength).pair(0, 0).strength
    assert found.parts() == {"preference": 0.8, "margin": pytest.approx(-0.2)}


def test_by_default_nothing_is_said(tmp_path):
    data = opened(tmp_path, trl(3, 1))
    assert data.pair(0, 0).strength == Strength()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((-1, 3), r"labels are votes, and one of them is -1"),
        (("many", 3), r"score_chosen and score_rejected hold 'many', expected numbers"),
        ((float("nan"), 3), r"hold \[nan, 3\], expected numbers"),
    ],
)
def test_numbers_that_are_none_are_skipped(scores, message, tmp_path):
    data = opened(tmp_path, trl(3, 1), trl(*scores), strength=StrengthConfig(preference=Votes()))
    first, second = data.without_images()
    assert isinstance(first[0], Comparison) and isinstance(second[0], Skipped)

    assert re.search(message, second[0].detail)


def test_rows_without_numbers_have_no_label(tmp_path):
    rows = trl(3, 1), trl(None, 1)
    data = opened(tmp_path, *rows, strength=StrengthConfig(preference=Votes()))
    first, second = data.without_images()
    assert isinstance(first[0], Comparison) and second == [LeftOut.UNLABELLED]


class TestDataThatCannotGiveIt:
    def refuses(self, tmp_path, row, strength, message, **settings):
        with pytest.raises(DataError, match=message):
            opened(tmp_path, row, strength=strength, **settings)

    def test_votes_of_data_without_any(self, tmp_path):
        self.refuses(
            tmp_path,
            forms.rlaif_v(0),
            StrengthConfig(preference=Votes()),
            r"responses\.strength\.preference reads the labels of the two sides, and this data set "
            r"says which response was chosen without numbers of the two \(score_chosen and",
        )

    def test_columns_that_are_not_there(self, tmp_path):
        strength = StrengthConfig(margin={"x": 1.0}, columns={"x": "a, score_rejected"})
        self.refuses(tmp_path, trl(3, 1), strength, r"columns\.x names a, and the data set has")

    def test_one_column_where_two_are_needed(self, tmp_path):
        strength = StrengthConfig(margin={"x": 1.0}, columns={"x": "score_rejected"})
        self.refuses(
            tmp_path, trl(3, 1), strength, "names 1 columns, and must name 2, of the chosen"
        )

    def test_rows_of_one_response(self, tmp_path):
        row = {"prompt": "What?", "completion": "A cat.", "label": True, "image": "0.png"}
        self.refuses(
            tmp_path, row, GAP, "each row of .* has one response.*leave responses.strength"
        )
