from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffalign.errors import DataError
from diffalign.files import (
    append_json_lines,
    disk_errors,
    finish_tree,
    numbered_lines,
    read_json_lines,
    replacing_file,
    to_json,
    write_atomically,
    write_image,
    write_json,
    write_json_lines,
    writing,
)

SEPARATORS = "one\u2028two\x85three\x0bfour"
"""Ends of lines to `str.splitlines`, and ordinary letters to JSON."""


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "new folder" / "x.png"
    write_atomically(target, b"old")

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["x.png"]


@pytest.fixture
def no_file_above_4_kb():
    """A real refusal of the system, as libraries tell it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("no_file_above_4_kb")
def test_a_disk_that_refuses_safetensors_is_an_error_of_the_disk(tmp_path):
    weights, target = {"x": torch.zeros(4096)}, tmp_path / "w.safetensors"
    with pytest.raises(OSError, match="File too large") as raised, disk_errors():
        save_file(weights, tmp_path / "x")
    assert raised.value.errno == errno.EFBIG
    message = r"w\.safetensors: cannot be written \(.*File too large"
    with pytest.raises(DataError, match=message), writing(target):
        save_file(weights, tmp_path / "x")
    with pytest.raises(OSError, match="File too large"), replacing_file(target) as draft:
        save_file(weights, draft)
    assert not target.exists()
    with pytest.raises(SafetensorError, match="something else"), disk_errors():
        raise SafetensorError("something else")


def test_the_disk_has_a_file_before_its_name_and_the_name_on_return(tmp_path, monkeypatch):
    done = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(self, target)

    monkeypatch.setattr("diffalign.files.flush", lambda path: done.append(path.name))
    monkeypatch.setattr(Path, "replace", noted)
    write_json(tmp_path / "x.json", {"a": 1})
    assert done == ["x.json.part", "renamed", tmp_path.name]
    assert (tmp_path / "x.json").read_text() == '{\n "a": 1\n}\n'


def test_weights_can_be_read_by_those_who_can_read_other_files(tmp_path):
    (tmp_path / "folder").mkdir()
    plain, file = tmp_path / "plain", tmp_path / "folder/file.safetensors"
    plain.touch()
    with replacing_file(tmp_path / "alone.safetensors") as draft:
        save_file({"a": torch.zeros(1)}, draft)
    save_file({"a": torch.zeros(1)}, file)
    finish_tree(file.parent)
    usual = plain.stat().st_mode
    assert (tmp_path / "alone.safetensors").stat().st_mode == file.stat().st_mode == usual


def test_an_image_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_image(tmp_path / "grid.png", Image.new("RGB", (2, 2)))
    before = (tmp_path / "grid.png").read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        write_image(tmp_path / "grid.png", Image.new("HSV", (2, 2)))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes() == before


def test_half_a_surrogate_pair_is_written_as_valid_utf8(tmp_path):
    row = {"prompt": "\ud83d", "other": "K\u00e4fer"}
    assert to_json(row) == json.dumps(row)
    assert to_json({"other": "K\u00e4fer"}) == '{"other": "K\u00e4fer"}'


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": SEPARATORS}, {"score": 0.1, "none": None}]
    write_json_lines(path, rows)
    append_json_lines(path, [{"prompt": "ein K\u00e4fer"}])
    assert read_json_lines(path) == [*rows, {"prompt": "ein K\u00e4fer"}]
    assert path.read_bytes().count(b"\n") == 3


def test_a_torn_last_line_is_ignored_and_then_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_json_lines(path) == [{"a": 1}]
    append_json_lines(path, [{"a": 3}])
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{}\n{"a"\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 2 is not JSON"):
        read_json_lines(tmp_path / "rows.jsonl")


def test_what_a_person_wrote_needs_no_last_line_end(tmp_path):
    path = tmp_path / "said.txt"
    path.write_bytes(f"\ufeffone\r\n\n \n{SEPARATORS}".encode())
    assert list(numbered_lines(path)) == [(1, "one"), (4, SEPARATORS)]


def test_a_disk_that_refuses_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written .*--resume"):
        write_json_lines(tmp_path / "file" / "rows.jsonl", [])
    with pytest.raises(DataError, match=r"grid\.png: cannot be written"), writing(Path("grid.png")):
        raise OSError(28, "No space left on device")
