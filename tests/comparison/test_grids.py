from __future__ import annotations

import pytest
from PIL import Image

from diffalign.comparison.grids import (
    checkpoint_strip,
    differences,
    prompts_by_seeds,
    write_grids,
)
from diffalign.generation.manifest import read_manifest
from tests.jobs.folders import fill

GAINS = {"a": 5, "b": -40, "c": 30, "d": 0}


@pytest.fixture
def rows(tmp_path):
    levels = {}
    for prompt, gain in GAINS.items():
        for seed in (0, 1):
            levels["base", prompt, seed] = 100
            levels["new", prompt, seed] = 100 + gain
    return {row.key: row for row in read_manifest(fill(tmp_path, levels))}


def scores_of(rows) -> dict:
    return {key: 100.0 + (GAINS[key[1]] if key[0] == "new" else 0) for key in rows}


def level(cell) -> int:
    return cell.image.getpixel((0, 0))[0]


def test_differences_are_those_of_the_same_prompt_and_seed(rows):
    scores = scores_of(rows)
    del scores["new", "d", 1], scores["base", "a", 0]
    found = differences(scores, "base", "new")
    assert found["b", 0] == -40 and found["c", 1] == 30
    assert not {("d", 1), ("a", 0)} & found.keys()


def test_seeds_stand_side_by_side(rows, tmp_path):
    grid = prompts_by_seeds(tmp_path, rows, "new", [0, 1], prompts=2, scores=scores_of(rows))
    assert [(row.caption, [level(cell) for cell in row.cells]) for row in grid] == [
        ("a", [105, 105]),
        ("c", [130, 130]),
    ]


def test_a_strip_has_prompts_down_and_checkpoints_across(rows, tmp_path):
    grid, columns = checkpoint_strip(tmp_path, rows, ["base", "new"], prompts=2)
    assert columns == ["base", "new"]
    assert [[level(cell) for cell in row.cells] for row in grid] == [[100, 105], [100, 130]]
    many = ["base", *(f"step-{n}" for n in range(20))]
    _, columns = checkpoint_strip(tmp_path, rows, many, prompts=1)
    assert len(columns) == 8 and (columns[0], columns[-1]) == ("base", "step-19")


def test_files_show_seeds_best_and_worst(rows, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        "diffalign.comparison.grids.render_grid",
        lambda rows, columns, title: shown.update({title: rows}) or Image.new("RGB", (8, 8)),
    )
    out = tmp_path / "grids"
    written = write_grids(tmp_path, out, rows, ["base", "new"], scores_of(rows), prompts=3)
    names = ["seeds-base.png", "seeds-new.png", "best-new.png", "worst-new.png"]
    assert [path.name for path in written] == names and all(path.is_file() for path in written)
    best, worst = shown["largest gains of new over base"], shown["largest losses of new over base"]
    assert [row.caption for row in best] == ["c", "a", "c"]
    assert [row.caption for row in worst] == ["b", "b"]
    assert write_grids(tmp_path, out, rows, ["base", "new"], {}, prompts=0) == []
