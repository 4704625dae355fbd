"""The score job with a pair judge: verdicts, scores, the position bias, and what reads them."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from diffalign import config
from diffalign.comparison.judged import read_bias
from diffalign.comparison.score import read_column, scores_by_item
from diffalign.data.score_columns import read_score_column
from diffalign.errors import CacheError, ConfigError, DataError
from diffalign.files import read_json_lines
from diffalign.jobs import compare, prefer, score
from tests.jobs.folders import fill

JUDGE = ("scorer.kind=pairwise", "scorer.judge.kind=tests.pair_judges.leaning_judge")


def run(images, *more: str) -> None:
    score.run(config.load(score.ScoreConfig, None, [f"images={images}", *JUDGE, *more]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def p_of(one: int, other: int, slope: float, lean: float) -> float:
    gap = slope * (one - other) / 255
    return (sigmoid(gap + lean) + 1 - sigmoid(-gap + lean)) / 2


LEVELS = {
    ("base", "a", 0): 10,
    ("base", "a", 1): 100,
    ("best", "a", 0): 220,
    ("base", "b", 0): 50,
    ("best", "b", 0): 60,
}


def test_a_score_is_the_mean_preference_to_the_other_images_of_the_prompt(tmp_path, capsys):
    fill(tmp_path, LEVELS)
    run(tmp_path, "scorer.judge.slope=3", "scorer.judge.lean=0.5", "batch_size=4")
    found = scores_by_item(tmp_path, tmp_path / "scores/pairwise.jsonl")
    for (model, prompt, seed), level in LEVELS.items():
        others = [v for k, v in LEVELS.items() if k[1] == prompt and k != (model, prompt, seed)]
        mean = sum(p_of(level, other, 3, 0.5) for other in others) / len(others)
        assert found[model, prompt, seed] == pytest.approx(mean, abs=1e-6)
    bias = read_bias(tmp_path / "scores/pairwise.jsonl")
    shown = [
        (sigmoid(3 * g / 255 + 0.5) + sigmoid(-3 * g / 255 + 0.5)) / 2 for g in (90, 210, 120, 10)
    ]
    assert bias.pairs == 4 and bias.first_shown == pytest.approx(sum(shown) / 4, abs=1e-6)
    assert bias.same_winner == 0.75  # 10 levels are less than the lean
    assert bias.interval[0] < bias.first_shown < bias.interval[1]
    said = " ".join(capsys.readouterr().out.split())
    assert f"shown first is preferred with a mean probability of {bias.first_shown:.3f} (95" in said
    assert "75% of 4 pairs have the same winner in both orders" in said


def test_only_new_pairs_are_asked_about_when_images_come(tmp_path):
    fill(tmp_path, {k: v for k, v in LEVELS.items() if k[0] == "base"})
    run(tmp_path)
    assert len(read_json_lines(tmp_path / "judgements/pairwise.jsonl")) == 1  # b has one image
    assert len(read_column(tmp_path / "scores/pairwise.jsonl")) == 2
    before = (tmp_path / "judgements/pairwise.jsonl").read_bytes()
    fill(tmp_path, {k: v for k, v in LEVELS.items() if k[0] == "best"})
    run(tmp_path)
    after = (tmp_path / "judgements/pairwise.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 4
    whole = tmp_path / "whole"
    fill(whole, LEVELS)
    run(whole)
    column = "scores/pairwise.jsonl"
    assert read_column(tmp_path / column) == read_column(whole / column)
    (tmp_path / column).unlink()  # made anew of the verdicts
    run(tmp_path)
    assert read_column(tmp_path / column) == read_column(whole / column)


def test_compare_and_prefer_take_what_a_judge_says(tmp_path):
    fill(tmp_path, LEVELS)
    run(tmp_path)
    (result,) = compare.run(
        config.load(compare.CompareConfig, None, [f"images={tmp_path}", "grid_rows=1"])
    )
    assert (result.comparison.wins, result.comparison.losses) == (2, 0)
    assert "Position bias of pairwise" in (tmp_path / "summary.md").read_text()
    out = prefer.run(
        config.load(
            prefer.PreferConfig, None, [f"images={tmp_path}", f"output={tmp_path / 'pairs'}"]
        )
    )
    assert out.is_file()


def test_another_judge_needs_another_column(tmp_path):
    fill(tmp_path, LEVELS)
    run(tmp_path)
    with pytest.raises(CacheError, match="Choose another column with name=NAME"):
        run(tmp_path, "scorer.judge.slope=2")
    run(tmp_path, "scorer.judge.slope=2", "name=steep")


def test_what_cannot_be_judged_is_named(tmp_path):
    fill(tmp_path, {**LEVELS, ("base", "raise", 0): 1, ("base", "raise", 1): 2})
    with pytest.raises(DataError, match=r"(?s)1 image has no score.*this prompt cannot be judg"):
        run(tmp_path)
    assert len(read_column(tmp_path / "scores/pairwise.jsonl")) == 5
    alone = tmp_path / "alone"
    fill(alone, {("base", "a", 0): 0})
    with pytest.raises(DataError, match="no prompt with two images to be compared"):
        run(alone)
    with pytest.raises(ConfigError, match="repeats is 2, and pairwise compares the images"):
        run(tmp_path, "repeats=2")


def test_of_a_data_set_the_verdicts_are_compared_with_its_labels(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i, (one, other, chosen) in enumerate([(0, 200, 1), (180, 20, 0), (30, 90, 0)]):
        for side, level in (("a", one), ("b", other)):
            Image.new("RGB", (8, 8), (level,) * 3).save(data / f"{i}{side}.png")
        pair = {"chosen": f"{i}{'ab'[chosen]}.png", "rejected": f"{i}{'ab'[1 - chosen]}.png"}
        rows.append({"caption": f"prompt {i}", **pair})
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score.run(
        config.load(
            score.ScoreConfig,
            None,
            [
                f"data.path={data / 'pairs.jsonl'}",
                f"output={tmp_path / 'scores'}",
                "agreement=true",
                *JUDGE,
                "scorer.judge.slope=3",
            ],
        )
    )
    column = read_score_column(tmp_path / "scores/pairwise.parquet")
    assert len(column.rows) == 6 and column.scorer.kind == "pairwise"
    assert len(read_json_lines(tmp_path / "scores/judgements/pairwise.jsonl")) == 3
    found = json.loads((tmp_path / "scores/pairwise.agreement.json").read_text())
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert "Agrees with 66.7% of 3 labelled pairs" in " ".join(capsys.readouterr().out.split())
