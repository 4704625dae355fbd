import pytest

from diffalign.data.preview import preview
from diffalign.data.source import DataConfig
from diffalign.errors import DataError
from tests.layouts import WRITERS, make_pairs, pickapic_rows, write_rows


def config(path, **settings):
    return DataConfig(path=str(path), resolution=16, **settings)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_first_pairs_are_shown_with_size_and_caption(kind, tmp_path):
    WRITERS[kind](tmp_path, make_pairs(4, size=(40, 30)))
    shown = preview(config(tmp_path), 2)
    assert [row.prompt for row in shown.rows] == ["a red thing, number 0", "a red thing, number 1"]
    assert {row.chosen for row in shown.rows} == {row.rejected for row in shown.rows} == {(30, 40)}
    assert f"read by {kind}" in shown.lines[0]


def test_counts_and_skipped_rows_are_told(tmp_path):
    rows = pickapic_rows(make_pairs(5))
    rows[0]["label_0"] = rows[0]["label_1"] = 0.5
    rows[1]["caption"] = ""
    write_rows(tmp_path / "x.parquet", rows)
    shown = preview(config(tmp_path, max_bad_fraction=0.5), 1)
    assert shown.lines[1:] == [
        "5 rows: 4 pairs, 1 left out (tie)",
        "skipped so far: 1 empty caption",
    ]


def test_an_image_that_cannot_be_used_is_shown_as_such(tmp_path):
    rows = pickapic_rows(make_pairs(2))
    rows[0]["jpg_0"] = b"garbage"
    write_rows(tmp_path / "x.parquet", rows)
    (row,) = preview(config(tmp_path), 1).rows
    assert row.chosen.startswith("corrupt image: no known image format")
    assert row.rejected == (32, 32)


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_labels_are_refused(streaming, tmp_path):
    write_rows(
        tmp_path / "x.parquet", [{**r, "label_0": 3.0} for r in pickapic_rows(make_pairs(2))]
    )
    with pytest.raises(DataError, match=r"row-00000000: label_0 is 3 \(allowed: 0, 0.5, 1\)"):
        preview(config(tmp_path, streaming=streaming), 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_ties_is_refused(streaming, tmp_path):
    ties = [{**r, "label_0": 0.5, "label_1": 0.5} for r in pickapic_rows(make_pairs(2))]
    write_rows(tmp_path / "x.parquet", ties)
    with pytest.raises(DataError, match=r"nothing to train on|no row holds a preference"):
        preview(config(tmp_path, streaming=streaming), 1)
