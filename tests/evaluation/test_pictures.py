from __future__ import annotations

import pytest
from PIL import Image

from diffalign.evaluation.manifest import ManifestRow
from diffalign.evaluation.pictures import grid_rows, spread_items


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


def test_a_damaged_picture_is_an_empty_cell(folder):
    (folder / "b.png").write_bytes(b"not a picture")
    rows = {row(model).key: row(model) for model in "ab"}
    (grid_row,) = grid_rows(folder, rows, "ab", [("p", 0)])
    assert [cell is None for cell in grid_row.cells] == [False, True]
