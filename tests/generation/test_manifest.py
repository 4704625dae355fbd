from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from diffalign.errors import DataError
from diffalign.generation.manifest import (
    MANIFEST,
    ManifestRow,
    append_rows,
    grid_rows,
    read_manifest,
    seeds_side_by_side,
    spread_items,
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


# --- which images a grid shows ------------------------------------------------------------------


def test_different_prompts_come_before_further_seeds():
    places = [(prompt, seed) for prompt in "abc" for seed in (0, 1)]
    assert spread_items(places, 3) == [("a", 0), ("b", 0), ("c", 0)]
    assert spread_items(places, 5) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]
    assert spread_items(places, 99) == places


def test_prompts_are_spread_over_the_whole_list():
    places = [(f"{i:02}", 0) for i in range(100)]
    assert [prompt for prompt, _ in spread_items(places, 4)] == ["00", "25", "50", "75"]


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def row_of(model: str) -> ManifestRow:
    return ManifestRow(
        model=model,
        prompt="a red circle",
        prompt_id="p",
        seed=0,
        file=f"{model}.png",
        sha256="",
        fingerprint="",
        sampler={},
    )


@pytest.mark.parametrize(
    ("scores", "winners"),
    [((1.0, 2.0), [False, True]), ((1.0, 1.0), [False, False]), ((1.0,), [False, False])],
)
def test_the_only_best_of_a_row_wins(folder, scores, winners):
    rows = {row_of(model).key: row_of(model) for model in "ab"}
    by_item = {(model, "p", 0): s for model, s in zip("ab", scores, strict=False)}
    (grid_row,) = grid_rows(folder, rows, "ab", [("p", 0)], by_item)
    assert grid_row.caption == "a red circle"
    assert [cell is not None and cell.winner for cell in grid_row.cells] == winners


def test_a_damaged_image_is_an_empty_cell(folder):
    (folder / "b.png").write_bytes(b"not an image")
    rows = {row_of(model).key: row_of(model) for model in "ab"}
    (grid_row,) = grid_rows(folder, rows, "ab", [("p", 0)])
    assert [cell is None for cell in grid_row.cells] == [False, True]


def test_a_row_shows_the_same_noises_for_each_model(folder):
    rows = {}
    for model in "ab":
        for seed in range(4):
            entry = replace(row_of(model), seed=seed)
            rows[entry.key] = entry
    scores = {("a", "p", 1): 1.0, ("b", "p", 1): 0.0, ("a", "p", 2): 0.0, ("b", "p", 2): 1.0}
    places = [("p", seed) for seed in range(4)]
    (rendered,), titles = seeds_side_by_side(folder, rows, "ab", places, prompts=5, scores=scores)
    assert titles == ["a, 1", "a, 2", "a, 3", "b, 1", "b, 2", "b, 3"]
    assert [cell.score for cell in rendered.cells] == [None, 1.0, 0.0, None, 0.0, 1.0]
    assert [cell.winner for cell in rendered.cells] == [False, True, False, False, False, True]


def test_one_image_of_each_model_keeps_its_plain_title(folder):
    rows = {row_of(model).key: row_of(model) for model in "ab"}
    (rendered,), titles = seeds_side_by_side(folder, rows, "ab", [("p", 0)], prompts=1)
    assert titles == ["a", "b"] and len(rendered.cells) == 2
