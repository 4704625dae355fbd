import math

import pytest

from diffalign.data.pairs.columns import ImagePair, PairColumns
from diffalign.data.pairs.known_columns import (
    KNOWN_NAMES,
    find_columns,
    general_columns,
    pickapic_columns,
)
from diffalign.data.rows import Row
from diffalign.data.skipping import LeftOut, UnusableRowError
from diffalign.errors import DataError

PICKAPIC_NAMES = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]


def row(**values):
    defaults = {"caption": "a cat", "jpg_0": b"zero", "jpg_1": b"one"}
    return Row("row-7", {**defaults, **values})


def columns(names=PICKAPIC_NAMES, lower_is_better=False):
    return pickapic_columns(names, lower_is_better=lower_is_better)


@pytest.mark.parametrize(
    ("label_0", "label_1", "chosen"),
    [(1.0, 0.0, b"zero"), (0.0, 1.0, b"one"), (1, 0, b"zero"), (b"0", b"1", b"one")],
)
def test_the_larger_label_is_chosen(label_0, label_1, chosen):
    pair = columns().pair(row(label_0=label_0, label_1=label_1), None)
    assert isinstance(pair, ImagePair)
    assert pair.chosen == chosen
    assert {pair.chosen, pair.rejected} == {b"zero", b"one"}


def test_reversed_labels_choose_the_other_side():
    pair = columns(lower_is_better=True).pair(row(label_0=1.0, label_1=0.0), None)
    assert (pair.chosen, pair.rejected) == (b"one", b"zero")


def test_equal_labels_are_a_tie():
    assert columns().chosen(row(label_0=0.5, label_1=0.5)) is LeftOut.TIE


@pytest.mark.parametrize("missing", [None, math.nan, ""])
def test_a_missing_label_is_no_preference(missing):
    assert columns().chosen(row(label_0=missing, label_1=1.0)) is LeftOut.UNLABELLED


@pytest.mark.parametrize("value", [False, b"0", b"False", None])
def test_labels_do_not_count_where_has_label_is_false(value):
    mapping = columns([*PICKAPIC_NAMES, "has_label"])
    labelled = row(label_0=1.0, label_1=0.0, has_label=value)
    assert mapping.chosen(labelled) is LeftOut.UNLABELLED


@pytest.mark.parametrize("value", [True, b"1", b"true"])
def test_labels_count_where_has_label_is_true(value):
    mapping = columns([*PICKAPIC_NAMES, "has_label"])
    assert mapping.chosen(row(label_0=0.0, label_1=1.0, has_label=value)) == 1


def test_a_label_of_3_is_refused_with_row_value_and_allowed_values():
    with pytest.raises(UnusableRowError, match=r"label_1 is 3 \(allowed: 0, 0.5, 1\)"):
        columns().chosen(row(label_0=0.0, label_1=3.0))


def test_a_label_that_is_no_number_is_refused():
    with pytest.raises(UnusableRowError, match="label_0 is 'good', expected a number"):
        columns().chosen(row(label_0="good", label_1=1.0))


def test_ids_come_from_ranking_and_both_images():
    mapping = columns([*PICKAPIC_NAMES, "ranking_id", "image_0_uid", "image_1_uid"])
    found = row(label_0=1, label_1=0, ranking_id=3, image_0_uid="x", image_1_uid="y")
    assert mapping.pair(found, None).sample_id == "3-x-y"


def test_without_uids_the_id_is_the_place_of_the_row():
    assert columns().pair(row(label_0=1, label_1=0), None).sample_id == "row-7"


def test_votes_decide_between_image1_and_image2():
    names = ["prompt", "image1", "image2", "votes_image1", "votes_image2", "model1"]
    mapping = general_columns({}, names, lower_is_better=False)
    values = {"prompt": "p", "image1": b"1", "image2": b"2", "votes_image1": 2, "votes_image2": 9}
    assert mapping.pair(Row("r", values), None).chosen == b"2"


def test_image1_and_image2_alone_say_nothing_about_the_preference():
    assert general_columns({}, ["prompt", "image1", "image2"], lower_is_better=False) is None


def test_a_column_may_name_the_preferred_image():
    names = ["prompt", "image1", "image2", "preferred"]
    mapping = general_columns({}, names, lower_is_better=False)
    values = {"prompt": "p", "image1": b"1", "image2": b"2"}
    assert mapping.chosen(Row("r", {**values, "preferred": "image2"})) == 1
    assert mapping.chosen(Row("r", {**values, "preferred": " Image2\n"})) == 1
    assert mapping.chosen(Row("r", {**values, "preferred": "tie"})) is LeftOut.TIE
    with pytest.raises(UnusableRowError, match="number could mean either image"):
        mapping.chosen(Row("r", {**values, "preferred": 1}))


def test_columns_of_your_own_are_mapped_by_name():
    own = {"prompt": "t", "first": "a", "second": "b", "first_score": "x", "second_score": "y"}
    mapping = general_columns(own, ["t", "a", "b", "x", "y"], lower_is_better=True)
    values = {"t": "p", "a": b"a", "b": b"b", "x": 2.0, "y": 1.0}
    assert mapping.pair(Row("r", values), None).chosen == b"b"


def test_a_misspelt_column_of_your_own_is_refused_with_the_nearest():
    own = {"prompt": "txt", "chosen": "good", "rejected": "badd"}
    with pytest.raises(DataError, match=r"data.columns.rejected is badd.*Did you mean bad\?"):
        general_columns(own, ["txt", "good", "bad"], lower_is_better=False)


def test_incomplete_columns_of_your_own_are_refused():
    with pytest.raises(
        DataError, match=r"has prompt rejected; it needs exactly.*images prompt scores"
    ):
        general_columns({"prompt": "t", "rejected": "a"}, ["t", "a"], lower_is_better=False)


@pytest.mark.parametrize(
    ("configured", "names", "chosen"),
    [
        ({}, ["prompt", "chosen"], "chosen"),
        ({}, ["text", "image"], "image"),
        ({"prompt": "t", "chosen": "a"}, ["t", "a", "b"], "a"),
    ],
)
def test_preferred_images_may_be_alone(configured, names, chosen):
    mapping = general_columns(configured, names, lower_is_better=False)
    pair = mapping.pair(Row("r", {**dict.fromkeys(names, "p"), chosen: b"+"}), None)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", b"+", None)
    assert mapping.sides == ("chosen",)
    assert "every image is a preferred one" in mapping.describe()


def test_an_image_next_to_a_pair_does_not_hide_the_pair():
    names = ["prompt", "image", "chosen", "rejected"]
    assert general_columns({}, names, lower_is_better=False).images == ("chosen", "rejected")


def test_reversing_is_refused_where_there_are_no_numbers():
    with pytest.raises(DataError, match="preferred is chosen in every row"):
        find_columns({}, ["prompt", "chosen", "rejected"], lower_is_better=True)


def test_the_mapping_is_a_sentence():
    assert columns(lower_is_better=True).describe() == (
        "prompt from caption, images from jpg_0 and jpg_1, "
        "preferred is the image with the smaller of label_0 and label_1"
    )


def test_light_columns_leave_the_images_out():
    mapping = PairColumns(prompt="p", images=("a", "b"), scores=("x", "y"), identity=("i",))
    assert mapping.light() == ["p", "x", "y", "i"]
    assert set(mapping.all()) - set(mapping.light()) == {"a", "b"}


def test_hints_know_every_name():
    assert {"jpg_0", "label_1", "image1", "chosen", "caption"} <= set(KNOWN_NAMES)
