"""A folder of shards: what goes in comes out, whatever else happens to its files is found."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffalign.cache import shards
from diffalign.cache.shards import Identity, Kind, ShardReader, ShardWriter
from diffalign.errors import CacheError, DataError

REFERENCES = Kind(name="reference values", setting="reference_cache", unmarked=True)
ENCODINGS = Kind(name="encodings", setting="encodings_cache")
FINGERPRINT = {"autoencoder": "abc", "sizes": (64, 64), "dtype": "float16"}
NAMES = ["images-0.safetensors", "images-1.safetensors", "prompts-0.safetensors"]


def writer(folder: Path, kind: Kind = ENCODINGS, **changes: Any) -> ShardWriter:
    parts: dict[str, Any] = {"fingerprint": FINGERPRINT, "layout": {"pairs": 5}}
    return ShardWriter(folder, kind, Identity(**parts | changes), NAMES)


def reader(folder: Path, kind: Kind = ENCODINGS, **changes: Any) -> ShardReader:
    return ShardReader(folder, kind, FINGERPRINT | changes)


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {
        "half": torch.arange(12).reshape(3, 4).to(torch.float16) + number,
        "brain": torch.full((2,), 0.5 + number, dtype=torch.bfloat16),
        "scalar": torch.tensor(float(number)),
    }


def fill(folder: Path, names: list[str] = NAMES) -> ShardWriter:
    filled = writer(folder)
    for name in names:
        number = NAMES.index(name)
        filled.write(name, tensors(number), {"ids": [f"pair-{number}"], "skipped": None})
    return filled


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    fill(tmp_path)
    opened = reader(tmp_path)
    opened.check(NAMES)
    shard = opened.open(NAMES[1])
    assert shard.metadata == {"ids": ["pair-1"], "skipped": None}
    found, metadata = opened.read(NAMES[1])
    assert metadata == shard.metadata
    assert found.keys() == shard.names == tensors(1).keys()
    for name, value in tensors(1).items():
        for ours in (found[name], shard.tensor(name)):
            assert ours.dtype == value.dtype
            assert torch.equal(ours, value)


def test_the_same_values_are_the_same_bytes_in_every_folder(tmp_path):
    for folder in ("one", "two"):
        fill(tmp_path / folder)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("one", "two"))
    assert one == two
    assert len(one) == 4


def test_what_was_started_goes_on_and_leaves_what_is_finished(tmp_path):
    fill(tmp_path, NAMES[:1])
    assert writer(tmp_path).missing() == NAMES[1:]
    with pytest.raises(
        CacheError,
        match=r"not complete: 2 of 3 files are missing.*diffalign precompute CONFIG\.yaml "
        r"encodings_cache=",
    ):
        reader(tmp_path).check(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_is_found_at_once_and_built_again(tmp_path, name):
    whole = fill(tmp_path).folder / name
    content = whole.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        whole.write_bytes(content[:length])
        assert writer(tmp_path).missing() == [name]
        with pytest.raises(CacheError, match=rf"{name} is damaged.*diffalign precompute"):
            reader(tmp_path).check(NAMES)
    fill(tmp_path, [name])
    assert whole.read_bytes() == content


def test_every_flipped_byte_is_found_by_a_checksum(tmp_path):
    path = fill(tmp_path).folder / NAMES[0]
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert writer(tmp_path).missing() == [NAMES[0]], place
        with pytest.raises(CacheError, match="is damaged"):
            reader(tmp_path).read(NAMES[0])
        if place < length:  # a start looks at headers alone
            with pytest.raises(CacheError, match="is damaged"):
                reader(tmp_path).check(NAMES)


def test_a_shard_of_another_folder_is_none_of_this(tmp_path):
    fill(tmp_path / "a")
    other = ShardWriter(
        tmp_path / "b", ENCODINGS, Identity(fingerprint={"autoencoder": "x"}, layout={}), NAMES
    )
    other.write(NAMES[0], tensors(0))
    (tmp_path / "b" / NAMES[0]).replace(tmp_path / "a" / NAMES[0])
    assert writer(tmp_path / "a").missing() == NAMES[:1]
    with pytest.raises(CacheError, match=r"damaged \(it belongs to another folder\)"):
        reader(tmp_path / "a").check(NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": "x"}, "autoencoder was 'abc' there and is 'x' here"),
        ({"sizes": (32, 64)}, r"sizes was \[64, 64\] there and is \[32, 64\] here"),
        ({"template": "t"}, "template was None there and is 't' here"),
    ],
)
def test_other_settings_are_refused_by_their_name(tmp_path, changes, message):
    fill(tmp_path)
    before = (tmp_path / "index.json").read_bytes()
    command = r".*diffalign precompute CONFIG\.yaml encodings_cache="
    with pytest.raises(CacheError, match=message + command):
        reader(tmp_path, **changes)
    with pytest.raises(CacheError, match=message + command):
        writer(tmp_path, fingerprint=FINGERPRINT | changes)
    assert (tmp_path / "index.json").read_bytes() == before


def test_a_reader_may_depend_on_less_and_a_writer_may_not(tmp_path):
    fill(tmp_path)
    ShardReader(tmp_path, ENCODINGS, {"dtype": "float16"}).check(NAMES)
    with pytest.raises(CacheError, match="autoencoder was 'abc' there and is None here"):
        writer(tmp_path, fingerprint={"dtype": "float16"})
    with pytest.raises(CacheError, match="pairs was 5 there and is 6 here"):
        writer(tmp_path, layout={"pairs": 6})


def test_a_folder_of_another_kind_is_refused_by_its_kind(tmp_path):
    fill(tmp_path)
    for use in (reader, writer):
        with pytest.raises(CacheError, match="holds encodings, not reference values"):
            use(tmp_path, REFERENCES)


def test_a_folder_of_nothing_names_the_command(tmp_path):
    with pytest.raises(CacheError, match=r"holds no encodings: .*encodings_cache="):
        reader(tmp_path)


def test_a_damaged_index_is_told_and_written_anew_once_it_is_removed(tmp_path):
    index = fill(tmp_path).folder / "index.json"
    content = index.read_text()
    index.write_text(content.replace("abc", "abd"))
    for use in (reader, writer):
        with pytest.raises(CacheError, match=r"is damaged: it is not as it was written\. Remove"):
            use(tmp_path)
    index.unlink()
    assert writer(tmp_path).missing() == []
    assert index.read_text() == content


def test_a_writer_that_is_killed_leaves_whole_files_only(tmp_path, monkeypatch):
    seal = shards._seal
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(shards, "_seal", lambda path: (seal(path), os.kill(os.getpid(), 9)))
        try:
            fill(tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / NAMES[0]).exists()
    assert (tmp_path / f"{NAMES[0]}.part").exists()
    assert fill(tmp_path, writer(tmp_path).missing()).missing() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*NAMES, "index.json"])


def test_a_disk_that_refuses_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    filled = fill(tmp_path, NAMES[:1])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written.*No space left.*make room"):
        filled.write(NAMES[1], tensors(1))
    assert filled.missing() == NAMES[1:]
    assert not list(tmp_path.glob("*.part"))


def test_reference_values_without_checksums_are_still_read_and_finished(tmp_path):
    index = {"fingerprint": {"model": "m"}, "views": ["chosen"], "draws": 1}
    (tmp_path / "index.json").write_text(json.dumps(index))
    save_file({"chosen": torch.ones(2)}, tmp_path / NAMES[0], metadata={"ids": '["a", "b"]'})
    identity = Identity(fingerprint={"model": "m"}, layout={"views": ["chosen"], "draws": 1})
    goes_on = ShardWriter(tmp_path, REFERENCES, identity, NAMES)
    assert goes_on.missing() == NAMES[1:]
    for name in NAMES[1:]:
        goes_on.write(name, tensors(0), {"ids": []})
    opened = ShardReader(tmp_path, REFERENCES, {"model": "m"})
    opened.check(NAMES)
    assert opened.open(NAMES[0]).metadata == {"ids": ["a", "b"]}
    assert opened.read(NAMES[0])[0]["chosen"].tolist() == [1, 1]
    with pytest.raises(CacheError, match=r"is no index of encodings"):
        ShardReader(tmp_path, ENCODINGS, {})
