import pytest

from diffalign.data.location import locate, other_splits
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.errors import ConfigError, DataError
from tests.layouts import WRITERS, make_pairs, pickapic_rows, write_pickapic, write_rows


def config(path, **settings):
    return PairConfig(path=str(path), resolution=16, **settings)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_reader_is_recognised_and_named_with_its_mapping(kind, tmp_path):
    WRITERS[kind](tmp_path / "set", make_pairs(2))
    summary = open_data(config(tmp_path / "set")).summary
    assert f"read by {kind}" in summary
    assert "prompt from" in summary
    assert "preferred is" in summary


@pytest.mark.parametrize("kind", WRITERS)
def test_the_reader_may_be_named(kind, tmp_path):
    WRITERS[kind](tmp_path / "set", make_pairs(2))
    opened = open_data(config(tmp_path / "set", kind=kind))
    assert open_data(config(tmp_path / "set")).columns == opened.columns


@pytest.mark.parametrize("path", ["gone", "gone.parquet", "./gone/pairs", "gone/pairs.jsonl"])
def test_a_missing_path_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"data.path {path} does not exist. Give a file, a folder"):
        locate(config(path))


@pytest.mark.parametrize("path", ["~/pairs", "~/pairs/x.parquet", "~/pairs/*.parquet"])
def test_a_tilde_is_the_home_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_rows(tmp_path / "pairs" / "x.parquet", pickapic_rows(make_pairs(2)))
    assert locate(config(path)).files == (file,)


def test_two_words_with_a_slash_are_a_hub_id():
    location = locate(config("yuvalkirstain/pickapic_v2"))
    assert location.root is None
    assert location.describe() == "yuvalkirstain/pickapic_v2 on the hub"


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    message = (
        r"without .parquet, .arrow, .jsonl, .tar, .json files, and without folders named "
        r"win/ with lose/, or chosen/ with rejected/, or win/, or chosen/\. It holds: notes\.md$"
    )
    with pytest.raises(DataError, match=message):
        locate(config(tmp_path))
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"It holds: a, b, c, d, e, \.\.\.$"):
        locate(config(tmp_path))


def test_a_file_of_another_type_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("x")
    with pytest.raises(DataError, match=r"has files of type .csv; they must all be of one of"):
        locate(config(tmp_path / "pairs.csv"))


def test_a_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches this pattern"):
        locate(config(tmp_path / "*.parquet"))


def test_a_pattern_names_files(tmp_path):
    write_pickapic(tmp_path, make_pairs(6), files=3)
    location = locate(config(tmp_path / "data" / "*-0000[01]-*.parquet"))
    assert [file.name[:11] for file in location.files] == ["train-00000", "train-00001"]
    assert location.root == tmp_path / "data"


def test_one_file_is_enough(tmp_path):
    file = write_rows(tmp_path / "x.parquet", pickapic_rows(make_pairs(2)))
    assert locate(config(file)).files == (file,)


def test_the_split_is_read_from_file_names(tmp_path):
    rows = pickapic_rows(make_pairs(2))
    for name in ("train-00000-of-00001", "validation_unique-00000-of-00001-0a1b2c"):
        write_rows(tmp_path / f"{name}.parquet", rows)
    (file,) = locate(config(tmp_path, split="validation_unique")).files
    assert file.name.startswith("validation_unique")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("Test", "Train"), ("Train",)),
        (("eval", "train"), ("train",)),
        (("cats_test", "cats_train", "dogs"), ("cats_train", "dogs")),
        (("cats", "cats_test"), ("cats", "cats_test")),
        (("latest",), ("latest",)),
    ],
)
def test_files_of_other_splits_are_not_trained_on_however_they_are_named(names, read, tmp_path):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text("{}")
    assert [file.stem for file in locate(config(tmp_path)).files] == list(read)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    with pytest.raises(DataError, match=r"data.split test: .* belong to the splits train$"):
        locate(config(tmp_path, split="test"))


def test_parquet_without_a_label_is_refused_with_what_is_there_and_what_is_needed(tmp_path):
    rows = [
        {name: value for name, value in row.items() if not name.startswith("label")}
        for row in pickapic_rows(make_pairs(2))
    ]
    write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError) as error:
        open_data(config(tmp_path))
    message = str(error.value)
    assert "no preference in the columns are_different, best_image_uid, caption" in message
    assert "pickapic needs caption, jpg_0, jpg_1, label_0, label_1" in message
    assert "data.columns" in message


def test_a_misspelt_column_is_recognised(tmp_path):
    rows = [
        {{"label_0": "lable_0"}.get(name, name): value for name, value in row.items()}
        for row in pickapic_rows(make_pairs(2))
    ]
    write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match="lable_0 looks like label_0"):
        open_data(config(tmp_path))


def test_a_reader_for_other_files_is_refused(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    with pytest.raises(
        DataError, match=r"data.kind folder cannot read .* folder needs the folders"
    ):
        open_data(config(tmp_path, kind="folder"))


def test_an_unknown_reader_is_refused_with_the_known_ones(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    with pytest.raises(
        ConfigError, match=r"folder, json_list, jsonl, parquet, pickapic, webdataset"
    ):
        open_data(config(tmp_path, kind="pickapick"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"x.parquet is no readable parquet file"):
        open_data(config(tmp_path))


def test_buckets_are_refused_for_tar_shards(tmp_path):
    WRITERS["webdataset"](tmp_path, make_pairs(2))
    with pytest.raises(DataError, match=r"data.buckets needs every image's size in advance"):
        open_data(config(tmp_path, buckets=True))


def test_columns_of_your_own_open_any_parquet(tmp_path):
    rows = [{"t": "p", "good": p.chosen, "bad": p.rejected} for p in make_pairs(2)]
    write_rows(tmp_path / "x.parquet", rows)
    own = {"prompt": "t", "chosen": "good", "rejected": "bad"}
    assert "images from good and bad" in open_data(config(tmp_path, columns=own)).summary


def test_other_splits_are_those_that_file_names_carry(tmp_path):
    for split in ("train", "test", "validation"):
        write_pickapic(tmp_path / split, make_pairs(1))
        name = f"{split}-00000-of-00001.parquet"
        (tmp_path / split / "data" / "train-00000-of-00001.parquet").rename(tmp_path / name)
    assert other_splits(config(tmp_path)) == ["test", "validation"]
    assert other_splits(config(tmp_path, split="test")) == ["train", "validation"]
    assert other_splits(config(tmp_path / "test-00000-of-00001.parquet")) == []
    assert other_splits(config("owner/name")) == other_splits(config("s3://bucket/x")) == []
