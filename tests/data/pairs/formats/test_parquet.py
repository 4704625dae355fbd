import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.skipping import Skipped
from tests.data.conftest import ids, open_source, take
from tests.layouts import make_pairs, write_parquet, write_rows


def pairs_in(folder, **settings):
    data = open_data(PairConfig(path=str(folder), resolution=8, **settings))
    return [data.columns.pair(data.rows[i], data.base) for i in range(len(data.rows))]


def test_the_image_with_more_votes_is_chosen(tmp_path):
    source = make_pairs(4)
    found = pairs_in(write_parquet(tmp_path, source))
    assert [pair.chosen for pair in found] == [pair.chosen for pair in source]
    assert [pair.rejected for pair in found] == [pair.rejected for pair in source]


def test_fewer_may_be_better(tmp_path):
    source = make_pairs(2)
    found = pairs_in(write_parquet(tmp_path, source), labels="lower_is_better")
    assert [pair.chosen for pair in found] == [pair.rejected for pair in source]


@pytest.mark.parametrize("path", ["images/a.png", "./images/a.png"])
def test_paths_in_a_table_start_from_the_folder_of_the_data_set(path, tmp_path):
    write_rows(tmp_path / "x.parquet", [{"prompt": "p", "chosen": path, "rejected": "b.png"}])
    assert pairs_in(tmp_path)[0].chosen == tmp_path / "images" / "a.png"


def test_ids_are_places_in_the_data_set(tmp_path):
    write_parquet(tmp_path, make_pairs(2))
    assert [pair.sample_id for pair in pairs_in(tmp_path)] == ["row-00000000", "row-00000001"]


@pytest.mark.parametrize("settings", [{}, {"streaming": True}, {"buckets": True}])
def test_a_caption_that_is_not_utf_8_costs_its_own_row_alone(settings, tmp_path):
    captions = pa.array([b"a cat", "caf\u00e9".encode("latin-1"), "caf\u00e9".encode()])
    text = pc.cast(captions, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
    images = pa.array([pair.chosen for pair in make_pairs(3)])
    pq.write_table(
        pa.table({"prompt": text, "chosen": images, "rejected": images}), tmp_path / "x.parquet"
    )
    pairs = list(open_data(PairConfig(path=str(tmp_path), resolution=8, **settings)).pairs())
    assert [type(pair) is Skipped for pair in pairs] == [False, True, False]
    assert (pairs[0].prompt, pairs[2].prompt) == ("a cat", "caf\u00e9")
    assert "not UTF-8" in pairs[1].detail
    source = open_source(tmp_path, max_bad_fraction=0.5, **settings)
    assert set(ids(take(source, 3))) == {"row-00000000", "row-00000002"}
