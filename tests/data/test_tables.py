import json
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.location import Location
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.tables import HubStream, ParquetStream, TableRows, table_schema
from diffalign.errors import DataError
from tests.layouts import (
    encoded,
    make_pairs,
    pickapic_rows,
    solid_image,
    write_pickapic,
    write_rows,
)

COLUMNS = ["caption", "jpg_0"]


def parquet_files(folder, count=10, files=3):
    write_pickapic(folder, make_pairs(count), files=files)
    return sorted(folder.rglob("*.parquet"))


def streams(folder):
    files = parquet_files(folder)
    dataset = datasets.load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", streaming=True
    )
    return {"local": ParquetStream(files, COLUMNS), "hub": HubStream(dataset, COLUMNS, name="a/b")}


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_a_stream_gives_every_row_in_order_with_the_asked_columns(kind, tmp_path):
    stream = streams(tmp_path)[kind]
    rows = list(stream.all_rows())
    assert [row.values["caption"] for row in rows] == [pair.caption for pair in make_pairs(10)]
    names = {
        "local": [f"row-{i:08d}" for i in range(10)],
        "hub": [
            f"shard-{part:05d}-row-{i:08d}" for part, n in enumerate((3, 3, 4)) for i in range(n)
        ],
    }
    assert [row.name for row in rows] == names[kind]
    assert set(rows[0].values) == set(COLUMNS)


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_a_stream_resumes_at_any_row_and_starts_anew_afterwards(kind, tmp_path):
    stream = streams(tmp_path)[kind]
    assert len(stream.parts) == 3
    for part in range(3):
        whole = list(stream.rows(part))
        for start in range(len(whole)):
            cursor = json.loads(json.dumps(whole[start][0]))
            assert [row for _, row in stream.rows(part, cursor)] == [
                row for _, row in whole[start:]
            ]
            again = list(stream.rows(part, whole[start][0]))
            assert [row for _, row in stream.rows(part, again[-1][0])] == [whole[-1][1]]
        assert list(stream.rows(part)) == whole


def test_a_stream_skips_whole_row_groups_unread(tmp_path):
    (file,) = parquet_files(tmp_path, count=12, files=1)  # row groups of 4
    stream = ParquetStream([file], COLUMNS)
    assert stream.parts == [4, 4, 4]
    encoded = sum(len(row.values["jpg_0"]) for _, row in stream.rows(0))
    assert 2 * encoded <= stream.held_bytes <= 2 * encoded + 2000
    cursor = list(stream.rows(2))[1][0]
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)  # ruin the first group, not the directory at the end
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(stream.rows(0))
    assert [row.name for _, row in stream.rows(2, cursor)] == [
        "row-00000009",
        "row-00000010",
        "row-00000011",
    ]


def test_a_file_that_lacks_a_column_is_refused(tmp_path):
    write_rows(tmp_path / "a.parquet", pickapic_rows(make_pairs(2)))
    write_rows(tmp_path / "b.parquet", [{"caption": "x"}])
    stream = ParquetStream(sorted(tmp_path.glob("*.parquet")), COLUMNS)
    with pytest.raises(DataError, match=r"b.parquet lacks jpg_0, unlike the first"):
        list(stream.all_rows())


def image_table(image):
    features = datasets.Features({"p": datasets.Value("string"), "a": datasets.Image()})
    return datasets.Dataset.from_dict({"p": ["x"], "a": [image]}, features=features)


def test_images_of_a_hub_data_set_stay_encoded(tmp_path):
    content = encoded(solid_image((200, 0, 0)))
    rows = TableRows(image_table({"bytes": content, "path": None}), ["p", "a"])
    assert rows[0].values["a"]["bytes"] == content
    table = image_table({"bytes": content, "path": None}).to_iterable_dataset()
    streamed = HubStream(table, ["a"], name="a/b")
    assert next(streamed.rows(0))[1].values["a"]["bytes"] == content


def test_the_start_of_a_row_holds_no_more_than_a_header():
    long = bytes(300_000)
    rows = TableRows(image_table({"bytes": long, "path": None}), ["p", "a"])
    assert len(rows.start_of(0).values["a"]) == 65_536
    plain = TableRows(datasets.Dataset.from_dict({"p": ["x", "y"], "a": [long, None]}), ["p", "a"])
    assert len(plain.start_of(0).values["a"]) == 65_536
    assert plain.start_of(1).values == {"p": "y", "a": None}


def test_a_scan_gives_the_asked_columns_of_all_rows(tmp_path):
    location = Location(path="x", form="table", files=tuple(parquet_files(tmp_path)), root=tmp_path)
    rows = TableRows(
        datasets.load_dataset(
            "parquet", data_files=[str(f) for f in location.files], split="train"
        ),
        COLUMNS,
    )
    assert [list(row.values) for row in islice(rows.scan(["caption"]), 2)] == [["caption"]] * 2
    assert len(list(rows.scan(["caption"]))) == len(rows) == 10
    assert table_schema(location, PairConfig(path="x", resolution=8)).names[:2] == (
        "are_different",
        "best_image_uid",
    )


def test_a_hub_id_that_leads_nowhere_is_a_sentence(monkeypatch):
    def nowhere(*arguments, **keywords):
        raise FileNotFoundError("Dataset 'some/where' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    config = PairConfig(path="some/where", resolution=8)
    with pytest.raises(DataError, match=r"some/where \(no file or folder here either\): Dataset"):
        table_schema(Location(path="some/where", form="table"), config)


def test_a_hub_that_falls_silent_is_a_sentence_that_says_how_to_go_on():
    def rows():
        yield {"a": 1}
        raise ConnectionError("no route to host")

    stream = HubStream(datasets.IterableDataset.from_generator(rows), ["a"], name="some/where")
    arriving = stream.rows(0)
    assert next(arriving)[1].values == {"a": 1}
    with pytest.raises(DataError, match=r"some/where: the hub stopped at row 1: .*route.*--resume"):
        next(arriving)


def test_split_and_revision_reach_the_hub(monkeypatch):
    asked = {}

    def load(**arguments):
        asked.update(arguments)
        return image_table({"bytes": b"x", "path": None}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = PairConfig(path="a/b", resolution=8, split="test", revision="abc", streaming=True)
    assert table_schema(Location(path="a/b", form="table"), config).names == ("p", "a")
    assert asked == {
        "path": "a/b",
        "split": "test",
        "revision": "abc",
        "streaming": True,
    }


def test_a_table_without_rows_is_passed_over_and_alone_is_a_sentence(tmp_path):
    config = PairConfig(path=str(tmp_path), resolution=8)
    schema = pa.schema({"prompt": pa.string(), "chosen": pa.binary(), "rejected": pa.binary()})
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="there is no row in it"):
        open_data(config)
    row = {"prompt": "p", "chosen": b"1", "rejected": b"0"}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "b.parquet")
    assert len(open_data(config).rows) == 1


def test_the_rows_of_a_stream_can_be_had_with_fewer_columns(tmp_path):
    stream = ParquetStream(parquet_files(tmp_path), COLUMNS)
    assert stream.about_rows == 10 and HubStream.about_rows.fget(stream) is None
    few = list(stream.only(["caption"]).all_rows())
    assert [row.name for row in few] == [row.name for row in stream.all_rows()]
    assert all(set(row.values) == {"caption"} for row in few)
