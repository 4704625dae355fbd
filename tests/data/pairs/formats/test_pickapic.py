import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.known_columns import PICKAPIC_IDENTITY
from diffalign.errors import DataError
from tests.layouts import make_pairs, pickapic_rows, write_pickapic, write_rows


def data_in(folder, **settings):
    return open_data(PairConfig(path=str(folder), resolution=8, **settings))


def pairs_in(folder, **settings):
    data = data_in(folder, **settings)
    return [data.columns.pair(data.rows[i], data.base) for i in range(len(data.rows))]


def test_the_labelled_side_is_chosen_whichever_column_it_is_in(tmp_path):
    source = make_pairs(6)
    found = pairs_in(write_pickapic(tmp_path, source, files=2))
    assert [pair.chosen for pair in found] == [pair.chosen for pair in source]
    assert [pair.rejected for pair in found] == [pair.rejected for pair in source]
    assert [pair.prompt for pair in found] == [pair.caption for pair in source]


def test_ids_come_from_the_ranking_and_both_images(tmp_path):
    first = pairs_in(write_pickapic(tmp_path, make_pairs(1)))[0]
    assert first.sample_id == "1000-uid-0-0-uid-0-1"


def test_uids_are_not_needed(tmp_path):
    rows = [
        {name: value for name, value in row.items() if name not in PICKAPIC_IDENTITY}
        for row in pickapic_rows(make_pairs(2))
    ]
    write_rows(tmp_path / "x.parquet", rows)
    assert [pair.sample_id for pair in pairs_in(tmp_path)] == ["row-00000000", "row-00000001"]


def test_nothing_else_of_a_row_is_read(tmp_path):
    data = data_in(write_pickapic(tmp_path, make_pairs(1)))
    assert set(data.rows[0].values) == {
        "caption",
        "jpg_0",
        "jpg_1",
        "label_0",
        "label_1",
        "has_label",
        *PICKAPIC_IDENTITY,
    }


def test_the_reader_asked_for_by_name_says_what_it_lacks(tmp_path):
    write_rows(tmp_path / "x.parquet", [{"prompt": "p", "chosen": b"", "rejected": b""}])
    with pytest.raises(DataError, match="pickapic needs caption, jpg_0, jpg_1, label_0, label_1"):
        data_in(tmp_path, kind="pickapic")
