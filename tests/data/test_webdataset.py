import io
import json
import tarfile

import pytest

from diffalign.data.reading import open_data
from diffalign.data.source import DataConfig
from diffalign.errors import DataError
from tests.layouts import make_pairs, write_webdataset


def write_tar(file, *members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def stream_of(path):
    return open_data(DataConfig(path=str(path), resolution=8))


def pairs_in(path):
    data = stream_of(path)
    return [data.columns.pair(row, data.base) for _, row in data.rows.rows()]


def test_members_are_read_like_columns(tmp_path):
    source = make_pairs(3)
    found = pairs_in(write_webdataset(tmp_path, source, shards=2))
    assert [pair.prompt for pair in found] == [pair.caption for pair in source]
    assert [pair.chosen for pair in found] == [pair.chosen for pair in source]
    assert [pair.sample_id for pair in found] == [
        "train-00000.tar/000000",
        "train-00001.tar/000001",
        "train-00001.tar/000002",
    ]


def test_members_need_no_further_ending(tmp_path):
    row = {"jpg_0": b"0", "jpg_1": b"1", "label_0": b"0.0", "label_1": b"1.0", "caption": b"c"}
    write_tar(tmp_path / "x.tar", *((f"k.{name}", content) for name, content in row.items()))
    (pair,) = pairs_in(tmp_path)
    assert (pair.chosen, pair.prompt) == (b"1", "c")


def test_chosen_and_rejected_with_a_txt_caption(tmp_path):
    write_tar(tmp_path / "x.tar", ("k.chosen.png", b"+"), ("k.rejected.png", b"-"), ("k.txt", b"c"))
    (pair,) = pairs_in(tmp_path)
    assert (pair.chosen, pair.rejected, pair.prompt) == (b"+", b"-", "c")


def test_labels_and_caption_may_come_as_json(tmp_path):
    fields = json.dumps({"label_0": 1, "label_1": 0, "caption": "c", "has_label": True}).encode()
    write_tar(tmp_path / "x.tar", ("k.jpg_0.jpg", b"0"), ("k.jpg_1.jpg", b"1"), ("k.json", fields))
    assert pairs_in(tmp_path)[0].chosen == b"0"


def test_a_member_that_one_sample_lacks_is_a_missing_image(tmp_path):
    write_webdataset(tmp_path, make_pairs(2))
    write_tar(tmp_path / "train-00001.tar", ("k.label_0.txt", b"1"), ("k.label_1.txt", b"0"))
    assert pairs_in(tmp_path)[-1].chosen is None


def test_a_stream_resumes_at_any_sample_of_any_shard(tmp_path):
    write_webdataset(tmp_path, make_pairs(7), shards=3)
    rows = stream_of(tmp_path).rows
    whole = list(rows.rows())
    for cursor, row in whole:
        assert next(rows.rows(json.loads(json.dumps(cursor))))[1].name == row.name
        assert len(list(rows.rows(cursor))) == len(whole) - whole.index((cursor, row))


def test_a_shard_that_breaks_off_is_refused_by_name(tmp_path):
    write_webdataset(tmp_path, make_pairs(4))
    file = tmp_path / "train-00000.tar"
    file.write_bytes(file.read_bytes()[:7000])
    with pytest.raises(DataError, match=r"shard .*train-00000.tar cannot be read to its end"):
        pairs_in(tmp_path)


def test_members_without_a_preference_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", ("k.gif", b"0"), ("k.txt", b"c"))
    with pytest.raises(DataError, match=r"no preference in the columns gif, caption. webdataset n"):
        pairs_in(tmp_path)


def test_a_picture_with_a_caption_is_a_preferred_image_alone(tmp_path):
    write_tar(tmp_path / "x.tar", ("k.jpg", b"+"), ("k.txt", b"c"))
    (pair,) = pairs_in(tmp_path)
    assert (pair.chosen, pair.rejected, pair.prompt) == (b"+", None, "c")
