"""Data in an object store: one that lies in memory, under the protocol of another."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from diffalign.data.location import fingerprint, locate
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.preview import without_download
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.errors import DataError
from tests.data.conftest import ids, open_source, take
from tests.layouts import make_pairs, write_pickapic
from tests.worlds import MOVED, ON_TWO, samples_of_steps

BUCKET = "s3://bucket/pairs"
SECRET = "AKIAIOSFODNN7EXAMPLE"


class Store(MemoryFileSystem):
    """Files in memory that say which ranges of them were read."""

    protocol = "s3"
    store: dict = {}  # noqa: RUF012  # of this class, not of the memory file system
    pseudo_dirs = [""]  # noqa: RUF012
    read: list[str] = []  # noqa: RUF012
    refuses: str | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3:/"))

    def unstrip_protocol(self, name):
        return f"s3:/{self._strip_protocol(name)}"

    def find(self, path, **options):
        if self.refuses:
            raise ConnectionError(self.refuses)
        return super().find(path, **options)

    def _open(self, path, mode="rb", **options):
        self.read.append(path)
        return super()._open(path, mode, **options)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Three files of three row groups, next to a hidden one, a note and another split."""
    fsspec.register_implementation("s3", Store, clobber=True)
    Store.clear_instance_cache()
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    monkeypatch.setattr(Store, "read", [])
    monkeypatch.setattr(Store, "refuses", None)
    write_pickapic(tmp_path / "here", make_pairs(36), files=3)
    filesystem = fsspec.filesystem("s3")
    for file in sorted((tmp_path / "here").rglob("*.parquet")):
        name = file.relative_to(tmp_path / "here").as_posix()
        filesystem.pipe(f"/bucket/pairs/{name}", file.read_bytes())
    filesystem.pipe("/bucket/pairs/.hidden.parquet", b"no table")
    filesystem.pipe("/bucket/pairs/readme.txt", b"a note")
    yield filesystem
    _registry.pop("s3")  # there is no public way back


def test_a_store_is_streamed_as_a_copy_of_it_is(store, tmp_path):
    settings = {"streaming": True, "shuffle_block": 4}
    there = take(open_source(BUCKET, **settings), 12)
    here = take(open_source(tmp_path / "here", **settings), 12)
    assert ids(there) == ids(here)
    assert [b.noise_seeds for b in there] == [b.noise_seeds for b in here]
    source = open_source(BUCKET, **settings)
    assert "s3://bucket/pairs: 3 parquet files of an object store" in source.describe()[0]


@pytest.mark.parametrize(
    "path", ["s3://bucket/pairs/data/*.parquet", "s3://bucket/pairs/**/*.parquet"]
)
def test_a_pattern_finds_the_files_of_a_store(path, store):
    found = locate(PairConfig(path=path, resolution=16, streaming=True)).stored
    assert len(found) == 3
    assert all(file.size and not file.name.name.startswith(".") for file in found)


def test_one_file_of_a_store_may_be_named(store):
    (first, *_) = locate(PairConfig(path=BUCKET, resolution=16, streaming=True)).stored
    (alone,) = locate(PairConfig(path=str(first), resolution=16, streaming=True)).stored
    assert alone.path == first.path


def test_a_store_is_seen_alike_on_any_number_of_processes(store, monkeypatch):
    def see(stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: open_source(BUCKET, layout=layout, streaming=True, shuffle_block=4),
            stages,
            accumulation=2,
        )

    assert see(MOVED["to four and back"]) == see(ON_TWO)


def test_moved_files_have_one_fingerprint_and_larger_ones_another(store):
    config = PairConfig(path=BUCKET, resolution=16, streaming=True)
    before = fingerprint(locate(config), config)
    for path in store.find("/bucket/pairs"):
        store.pipe(path.replace("/bucket", "/other"), store.cat(path))
    moved = PairConfig(path="s3://other/pairs", resolution=16, streaming=True)
    assert fingerprint(locate(moved), moved) == before
    store.pipe("/bucket/pairs/data/train-00003-of-00004.parquet", b"x")
    assert fingerprint(locate(config), config) != before


def test_a_split_is_chosen_by_the_names_in_a_store(store):
    store.pipe("/bucket/pairs/data/test-00000-of-00001.parquet", b"x")
    config = PairConfig(path=BUCKET, resolution=16, streaming=True)
    assert all("test" not in file.name.name for file in locate(config).stored)
    with pytest.raises(DataError, match=r"split nope: the files under s3://bucket/pairs belong"):
        locate(PairConfig(path=BUCKET, resolution=16, streaming=True, split="nope"))


def test_reading_a_store_at_random_is_refused(store):
    with pytest.raises(DataError, match=r"an object store, .* never at random: set data\.stream"):
        open_source(BUCKET)
    with pytest.raises(DataError, match=r"never at random: set data\.streaming"):
        open_source(BUCKET).preview(1)
    config = PairConfig(path=BUCKET, resolution=16)
    assert without_download(config) == config
    with pytest.raises(DataError, match=r"never at random: copy the files to this machine"):
        open_responses(ResponseConfig(path=BUCKET))


def test_a_store_without_tables_is_refused(store):
    store.pipe("/bucket/notes/a.txt", b"x")
    for path in ("s3://bucket/notes", "s3://bucket/nowhere"):
        with pytest.raises(DataError, match=rf"data\.path {path} holds no \.parquet file"):
            locate(PairConfig(path=path, resolution=16, streaming=True))


def test_a_damaged_table_of_a_store_is_named(store):
    store.pipe("/bucket/pairs/data/train-00002-of-00003.parquet", b"PAR1 broken")
    with pytest.raises(DataError, match=r"s3://bucket/pairs/\S+ cannot be read to its end: \w+: "):
        open_source(BUCKET, streaming=True)


def test_a_missing_package_is_a_sentence_with_the_command():
    import importlib.util

    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is here")
    with pytest.raises(DataError, match=r"data\.path s3://b/x: the package .* pip install s3fs"):
        locate(PairConfig(path="s3://b/x", resolution=16, streaming=True))


def test_an_unknown_store_is_refused():
    with pytest.raises(DataError, match=r"nostore://b/x cannot be listed: ValueError: Protocol"):
        locate(PairConfig(path="nostore://b/x", resolution=16, streaming=True))


def test_an_address_with_a_key_in_it_is_refused_without_showing_it(store):
    with pytest.raises(DataError, match="a config is no place for one") as error:
        locate(PairConfig(path=f"s3://me:{SECRET}@bucket/x", resolution=16, streaming=True))
    assert SECRET not in str(error.value)


def test_what_a_store_says_is_shown_without_its_keys(store):
    Store.refuses = f"GET https://me:{SECRET}@host/?X-Amz-Signature={SECRET} failed"
    with pytest.raises(DataError, match="cannot be listed: ConnectionError: GET") as error:
        locate(PairConfig(path=BUCKET, resolution=16, streaming=True))
    assert SECRET not in str(error.value)


def test_a_page_of_the_web_is_no_store():
    with pytest.raises(DataError, match=r"is no address of an object store, .*download the files"):
        locate(PairConfig(path="https://host/x.parquet", resolution=16, streaming=True))
