import io
import json
import tarfile

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.skipping import Skipped
from diffalign.errors import DataError
from tests.layouts import make_pairs, write_webdataset


def write_tar(file, *members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def stream_of(path):
    return open_data(PairConfig(path=str(path), resolution=8))


def pairs_in(path):
    data = stream_of(path)
    return list(data.pairs())


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
    assert len(rows.parts) == 3
    for part in range(3):
        whole = list(rows.rows(part))
        for cursor, row in whole:
            assert next(rows.rows(part, json.loads(json.dumps(cursor))))[1].name == row.name
            assert len(list(rows.rows(part, cursor))) == len(whole) - whole.index((cursor, row))


def test_a_shard_that_breaks_off_is_refused_by_name(tmp_path):
    write_webdataset(tmp_path, make_pairs(4))
    file = tmp_path / "train-00000.tar"
    file.write_bytes(file.read_bytes()[:7000])
    with pytest.raises(DataError, match=r"shard .*train-00000.tar cannot be read to its end"):
        pairs_in(tmp_path)


def test_members_without_a_preference_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", ("k.npy", b"0"), ("k.txt", b"c"))
    with pytest.raises(DataError, match=r"no preference in the columns caption, npy. webdataset n"):
        pairs_in(tmp_path)


def test_a_image_with_a_caption_is_a_preferred_image_alone(tmp_path):
    write_tar(tmp_path / "x.tar", ("k.jpg", b"+"), ("k.txt", b"c"))
    (pair,) = pairs_in(tmp_path)
    assert (pair.chosen, pair.rejected, pair.prompt) == (b"+", None, "c")


def member_list(key, chosen=b"0", rejected=b"1"):
    row = {"jpg_0.png": chosen, "jpg_1.png": rejected, "label_0.txt": b"1", "label_1.txt": b"0"}
    return [(f"{key}.{name}", content) for name, content in {**row, "caption.txt": b"c"}.items()]


def test_members_of_a_sample_need_not_follow_one_another(tmp_path):
    first, second = member_list("a", b"a0"), member_list("b", b"b0")
    mixed = [member for pair in zip(first, reversed(second), strict=True) for member in pair]
    write_tar(tmp_path / "x.tar", *mixed)
    found = pairs_in(tmp_path)
    assert [(pair.sample_id, pair.chosen) for pair in found] == [
        ("x.tar/a", b"a0"),
        ("x.tar/b", b"b0"),
    ]


def test_one_name_in_two_folders_or_twice_is_two_samples(tmp_path):
    members = [member_list(key, key.encode()) for key in ("x/a", "y/a")]
    write_tar(tmp_path / "x.tar", *members[0], *members[1], *member_list("x/a", b"again"))
    found = pairs_in(tmp_path)
    assert [pair.chosen for pair in found] == [b"x/a", b"y/a", b"again"]
    assert len({pair.sample_id for pair in found}) == 3


def test_stray_members_are_no_samples(tmp_path):
    strays = [(name, b"x") for name in ("._a.jpg_0.png", ".DS_Store", "README", "d/.x.json")]
    write_tar(tmp_path / "x.tar", *strays, *member_list("a"), *strays)
    assert len(pairs_in(tmp_path)) == 1


def test_endings_in_upper_case(tmp_path):
    write_tar(tmp_path / "x.tar", *[(name.upper(), content) for name, content in member_list("a")])
    assert pairs_in(tmp_path)[0].chosen == b"0"


def test_json_that_is_none_is_skipped_by_name(tmp_path):
    good = json.dumps({"caption": "c", "label_0": 1, "label_1": 0}).encode()
    members = [
        (f"{key}.{name}", content)
        for key, fields in {"a": good, "b": b"{broken", "c": good}.items()
        for name, content in {"jpg_0.png": b"0", "jpg_1.png": b"1", "json": fields}.items()
    ]
    write_tar(tmp_path / "x.tar", *members)
    found = pairs_in(tmp_path)
    assert isinstance(found[1], Skipped)
    assert "b.json" in found[1].detail
    assert [pair.sample_id for pair in found] == ["x.tar/a", "x.tar/b", "x.tar/c"]


def test_a_shard_with_rubbish_between_its_members_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", *member_list("a"), *member_list("b"))
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[5120 : 5120 + 512] = b"x" * 512
    (tmp_path / "x.tar").write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read to its end: no header of a member"):
        pairs_in(tmp_path)
