from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from diffalign.generation.chosen_images import grid_rows, seeds_side_by_side, spread_items
from diffalign.generation.manifest import ManifestRow
from diffalign.imaging.image_files import read_image


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


def row(model: str) -> ManifestRow:
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
    rows = {row(model).key: row(model) for model in "ab"}
    by_item = {(model, "p", 0): s for model, s in zip("ab", scores, strict=False)}
    (grid_row,) = grid_rows(folder, rows, "ab", [("p", 0)], by_item)
    assert grid_row.caption == "a red circle"
    assert [cell is not None and cell.winner for cell in grid_row.cells] == winners


def test_a_damaged_image_is_an_empty_cell(folder):
    (folder / "b.png").write_bytes(b"not an image")
    rows = {row(model).key: row(model) for model in "ab"}
    (grid_row,) = grid_rows(folder, rows, "ab", [("p", 0)])
    assert [cell is None for cell in grid_row.cells] == [False, True]


def test_a_row_shows_the_same_noises_for_each_model(folder):
    rows = {}
    for model in "ab":
        for seed in range(4):
            entry = dataclasses.replace(row(model), seed=seed)
            rows[entry.key] = entry
    scores = {("a", "p", 1): 1.0, ("b", "p", 1): 0.0, ("a", "p", 2): 0.0, ("b", "p", 2): 1.0}
    places = [("p", seed) for seed in range(4)]
    (rendered,), titles = seeds_side_by_side(folder, rows, "ab", places, prompts=5, scores=scores)
    assert titles == ["a, 1", "a, 2", "a, 3", "b, 1", "b, 2", "b, 3"]
    assert [cell.score for cell in rendered.cells] == [None, 1.0, 0.0, None, 0.0, 1.0]
    assert [cell.winner for cell in rendered.cells] == [False, True, False, False, False, True]


def test_one_image_of_each_model_keeps_its_plain_title(folder):
    rows = {row(model).key: row(model) for model in "ab"}
    (rendered,), titles = seeds_side_by_side(folder, rows, "ab", [("p", 0)], prompts=1)
    assert titles == ["a", "b"] and len(rendered.cells) == 2


def test_a_image_of_any_mode_is_read_as_rgb(tmp_path):
    Image.new("L", (2, 1), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").getpixel((1, 0)) == (7, 7, 7)
