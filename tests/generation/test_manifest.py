from __future__ import annotations

from dataclasses import replace

import pytest

from diffalign.errors import DataError
from diffalign.generation.manifest import (
    MANIFEST,
    ManifestRow,
    append_rows,
    read_manifest,
)


def row(seed: int, sha256: str = "abc") -> ManifestRow:
    return ManifestRow(
        model="base",
        prompt="ein Käfer",
        prompt_id="ein-k",
        seed=seed,
        file=f"images/base/ein-k-{seed}.png",
        sha256=sha256,
        fingerprint="f",
        sampler={"steps": 3, "scheduler": None},
    )


def test_rows_come_back_as_they_were(tmp_path):
    append_rows(tmp_path, [row(0), row(1)])
    append_rows(tmp_path, [row(2)])
    assert read_manifest(tmp_path) == [row(0), row(1), row(2)]


def test_what_a_killed_writer_leaves_behind_is_ignored_and_then_cut(tmp_path):
    append_rows(tmp_path, [row(0), row(1)])
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    assert read_manifest(tmp_path) == [row(0)]

    append_rows(tmp_path, [row(1), row(2)])
    assert read_manifest(tmp_path) == [row(0), row(1), row(2)]


def test_a_file_that_is_one_unfinished_line_starts_again(tmp_path):
    (tmp_path / MANIFEST).write_text('{"model": "ba')
    append_rows(tmp_path, [row(0)])
    assert read_manifest(tmp_path) == [row(0)]


def test_a_redrawn_image_counts_once(tmp_path):
    append_rows(tmp_path, [row(0, "old"), row(1), row(0, "new")])
    assert read_manifest(tmp_path) == [row(0, "new"), row(1)]


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../x.png", "images/../../x.png", "C:\\x.png", "", "a\0.png", "link/x.png"],
)
def test_a_file_outside_the_folder_is_refused(tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    append_rows(folder, [replace(row(0), file=file)])
    with pytest.raises(DataError, match=r"only files within this folder|outside of this folder"):
        read_manifest(folder)


def test_a_link_to_the_folder_itself_is_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    append_rows(tmp_path / "link", [row(0)])
    assert read_manifest(tmp_path / "link") == [row(0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"model": "base"}\n', "line 1 must have the keys"), ("oops\n", "line 1 is not JSON")],
)
def test_a_foreign_manifest_is_refused(tmp_path, content, message):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_a_missing_manifest_says_what_writes_one(tmp_path):
    with pytest.raises(DataError, match="diffalign generate writes one"):
        read_manifest(tmp_path)
