from __future__ import annotations

import json

import pytest

from diffalign.errors import DataError
from diffalign.rollouts.preferences import read_preferences

GROUPS = {"a-cat-0": 4, "a-dog-0": 3}


@pytest.fixture
def verdicts(tmp_path):
    def read(*lines):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return read_preferences(path, GROUPS)

    return read


def test_a_ranking_decides_every_pair_but_ties(verdicts):
    verdict = verdicts({"group": "a-cat-0", "ranking": [2, [0, 3], 1]})["a-cat-0"]
    assert verdict.decided == ((2, 0), (2, 3), (2, 1), (0, 1), (3, 1))
    assert (verdict.tied, verdict.undecided) == (1, 0)


def test_every_good_image_is_preferred_to_every_bad_one(verdicts):
    verdict = verdicts({"group": "a-cat-0", "good": [3, 1], "bad": [0]})["a-cat-0"]
    assert verdict.decided == ((3, 0), (1, 0))
    assert (verdict.tied, verdict.undecided) == (1, 3)  # 3 and 1 are equal; nothing is said of 2


def test_images_left_out_of_a_ranking_are_undecided(verdicts):
    verdict = verdicts({"group": "a-cat-0", "ranking": [3, 0]})["a-cat-0"]
    assert (verdict.decided, verdict.tied, verdict.undecided) == (((3, 0),), 0, 5)


def test_a_line_may_decide_nothing(verdicts):
    found = verdicts({"group": "a-cat-0", "ranking": []}, {"group": "a-dog-0", "ranking": [[0, 1]]})
    assert found["a-cat-0"].decided == found["a-dog-0"].decided == ()
    assert (found["a-cat-0"].undecided, found["a-dog-0"].tied) == (6, 1)


def test_several_lines_on_a_group_add_up(verdicts):
    found = verdicts(
        {"group": "a-cat-0", "ranking": [0, 1]},
        "",
        {"group": "a-cat-0", "good": [1], "bad": [2]},
        {"group": "a-cat-0", "ranking": [0, 1]},
        {"group": "a-cat-0", "ranking": [[0, 1]]},  # a tie does not undo what somebody decided
    )
    verdict = found["a-cat-0"]
    assert verdict.decided == ((0, 1), (1, 2))
    assert (verdict.tied, verdict.undecided) == (0, 4)


def test_a_line_separator_inside_an_id_ends_no_line(tmp_path):
    name = "a cat\u2028and a dog"
    (tmp_path / "p.jsonl").write_text(f'{{"group": "{name}", "ranking": [0, 1]}}', encoding="utf-8")
    assert read_preferences(tmp_path / "p.jsonl", {name: 2})[name].decided == ((0, 1),)


def test_a_file_without_an_end_of_line_counts_whole(verdicts):
    assert len(verdicts({"group": "a-cat-0", "ranking": [0, 1]})) == 1


RANKED = {"group": "a-cat-0", "ranking": [0, 1]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"group": "a-cat-0", "ranking": [0', r"p\.jsonl: line 2 is not JSON"),
        ("[1, 2]", r'line 2 must be \{"group": ID, "ranking".*, and has list'),
        ({"group": "a-cat-0"}, "line 2 must be .*, and has group"),
        ({"group": "a-cat-0", "good": [0]}, "line 2 must be .*, and has good, group"),
        ({"group": "a-cat-0", "ranking": [0], "good": [1], "bad": []}, "line 2 must be"),
        ({"group": "a-cot-0", "ranking": [0]}, "the group 'a-cot-0', which is none of the 2"),
        ({"group": "a-cot-0", "ranking": [0]}, r"Did you mean a-cat-0\?"),
        ({"group": ["a-cat-0"], "ranking": [0]}, "names the group .*, which is none of the 2"),
        ({"group": "a-dog-0", "ranking": [3]}, "image 3, and group 'a-dog-0' has images 0 to 2"),
        ({"group": "a-dog-0", "ranking": [-1]}, "image -1, and group 'a-dog-0' has images 0 to 2"),
        ({"group": "a-dog-0", "ranking": ["0"]}, "'a-dog-0' as whole numbers, got '0'"),
        ({"group": "a-dog-0", "ranking": [True]}, "as whole numbers, got true"),
        ({"group": "a-dog-0", "ranking": [[[0]]]}, r"as whole numbers, got \[0\]"),
        ({"group": "a-dog-0", "ranking": 1}, "a list of images as ranking, got 1"),
        ({"group": "a-dog-0", "good": 1, "bad": []}, "a list of images as good, got 1"),
        ({"group": "a-dog-0", "ranking": [1, 0, 1]}, "contradicts itself: .* image 1 of group"),
        ({"group": "a-dog-0", "good": [1], "bad": [1]}, "contradicts itself: .* image 1 of group"),
        ({"group": "a-cat-0", "ranking": [1, 0]}, "lines 1, 2 on group 'a-cat-0' contradict"),
        ({"group": "a-cat-0", "ranking": [1, 0]}, "put image (0 over 1 over 0|1 over 0 over 1)"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(verdicts, line, message):
    with pytest.raises(DataError, match=message):
        verdicts(RANKED, line)


def test_a_circle_over_several_lines_is_a_contradiction(verdicts):
    circle = [{"group": "a-dog-0", "ranking": pair} for pair in ([0, 1], [1, 2], [2, 0])]
    with pytest.raises(DataError, match="lines 1, 2, 3 on group 'a-dog-0' contradict each other"):
        verdicts(*circle)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such file of preferences"):
        read_preferences(tmp_path / "p.jsonl", GROUPS)
    (tmp_path / "p.jsonl").write_bytes(b"\xe9{}")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_preferences(tmp_path / "p.jsonl", GROUPS)


def test_a_list_of_numbers_for_each_group_in_order_as_d3po_has_them(verdicts):
    found = verdicts([[0, 1, 0, -1], [0.5, 0.5, 2]])
    assert set(found["a-cat-0"].decided) == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}
    assert (found["a-cat-0"].tied, found["a-cat-0"].undecided) == (1, 0)
    assert found["a-dog-0"].decided == ((2, 0), (2, 1))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 0, 1, 0]], "a list of 1 lists of numbers, as D3PO has them, and there are 2 groups"),
        ([[0, 1, 0], [0, 0, 1]], "list number 0 must hold a number for each of the 4 images"),
        ([[0, 1, 0, 1], [0, "a", 1]], "list number 1 must hold numbers, got 'a'"),
        ([[0, 1, 0, True], [0, 0, 1]], "list number 0 must hold numbers, got true"),
        ([[0, 1, 0, float("nan")], [0, 0, 1]], "list number 0 must hold numbers, got nan"),
        ([1, 2], "list number 0 must hold a number for each of the 4 images"),
    ],
)
def test_numbers_that_do_not_fit_the_groups_are_refused(lists, message, verdicts):
    with pytest.raises(DataError, match=message):
        verdicts(lists)


def test_a_list_over_several_lines(verdicts):
    found = verdicts("[", "[0, 0, 0, 1],", "[1, 0, 0]", "]")
    assert found["a-dog-0"].decided == ((0, 1), (0, 2))
