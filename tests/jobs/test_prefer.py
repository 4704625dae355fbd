"""The job prefer whole: scored images become a data set that training reads."""

from __future__ import annotations

import hashlib
import json
import math

import pyarrow.parquet as pq
import pytest

from diffalign import config
from diffalign.comparison.written_pairs import read_provenance
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.errors import ConfigError, DataError
from diffalign.jobs import prefer, score
from tests.jobs.folders import fill
from tests.layouts import Pair, encoded, pickapic_rows, solid_image, write_rows

BRIGHTNESS = "scorer.kind=tests.comparison.brightness"
LEVELS = {
    **{("base", "a cat", seed): level for seed, level in enumerate((0, 51, 102))},
    **{("base", "a dog", seed): level for seed, level in enumerate((255, 204))},
    ("base", "a cow", 0): 7,
    ("tuned", "a cat", 0): 255,
}


def made(*overrides):
    return prefer.run(config.load(prefer.PreferConfig, None, list(overrides)))


def scored(folder, *more):
    score.run(config.load(score.ScoreConfig, None, [f"images={folder}", BRIGHTNESS, *more]))
    return folder


@pytest.fixture
def images(tmp_path):
    return scored(fill(tmp_path / "images", LEVELS))


def pairs_of(path):
    """(caption, better score, other score) by the labels of the file."""
    found = set()
    for row in pq.read_table(path).to_pylist():
        won = 0 if row["label_0"] == 1.0 else 1
        assert row["label_0"] + row["label_1"] == 1.0 and row["has_label"]
        for side in (0, 1):
            content = row[f"jpg_{side}"]
            assert hashlib.sha256(content).hexdigest() == row[f"image_{side}_uid"]
        better, other = (round(row[f"brightness_{side}"], 4) for side in (won, 1 - won))
        found.add((row["caption"], better, other))
    return found


def test_best_against_worst_of_generated_images(images, tmp_path, capsys):
    path = made(f"images={images}", f"output={tmp_path / 'pairs'}")
    assert pairs_of(path) == {("a cat", 1.0, 0.0), ("a dog", 1.0, 0.8)}
    said = capsys.readouterr().out
    assert "2 pairs" in said and "1 of one image" in said
    data = open_data(PairConfig(path=str(path.parent), resolution=8))
    assert {pair.prompt for pair in data.pairs()} == {"a cat", "a dog"}
    assert "read by pickapic" in data.summary


def test_a_model_a_rule_and_a_temperature(images, tmp_path):
    path = made(
        f"images={images}",
        "models=[base]",
        "rule={kind: above_gap, gap: 0.15}",
        "temperature=0.4",
        f"output={tmp_path / 'pairs'}",
    )
    assert pairs_of(path) == {
        *(("a cat", 0.4, 0.0), ("a cat", 0.2, 0.0), ("a cat", 0.4, 0.2)),
        ("a dog", 1.0, 0.8),
    }
    for row in pq.read_table(path).to_pylist():
        gap = row["brightness_0"] - row["brightness_1"]
        assert row["preference_0"] == pytest.approx(1 / (1 + math.exp(-gap / 0.4)))
        assert row["num_example_per_prompt"] == (3 if row["caption"] == "a cat" else 1)
    strength = {"columns": {"p": "preference_0"}, "preference": {"kind": "given", "of": "p"}}
    tree = {"path": str(path.parent), "resolution": 8, "strength": strength}
    data = open_data(config.from_dict(PairConfig, tree))
    sure = sorted(pair.strength.preference for pair in data.pairs())
    expected = [1 / (1 + math.exp(-gap / 0.4)) for gap in (0.2, 0.2, 0.2, 0.4)]
    assert sure == pytest.approx(expected)


def test_the_file_says_how_it_came_to_be(images, tmp_path):
    path = made(f"images={images}", f"output={tmp_path / 'pairs'}")
    said = read_provenance(path)
    assert said["config"]["rule"] == {"kind": "best_worst"} and said["by"] == "brightness"
    assert said["pairs"] == 2 and said["prompts"] == 2
    assert said["scorers"]["brightness"]["fingerprint"].startswith("brightness")
    again = config.load(prefer.PreferConfig, path.parent / "prefer.yaml")
    other = prefer.run(
        config.from_dict(
            prefer.PreferConfig, {**config.to_dict(again), "output": str(tmp_path / "again")}
        )
    )
    assert pq.read_table(other).equals(pq.read_table(path))


def test_two_scorers_vote_and_make_fronts(images, tmp_path):
    scored(images, "scorer.scale=-1", "name=darkness")
    every = (f"images={images}", f"output={tmp_path / 'none'}")
    with pytest.raises(DataError, match="no pair comes of"):  # what one gains the other loses
        made(*every, "rule.kind=fronts")
    scored(images, "scorer.scale=3", "name=triple")
    files = {n: f"{images}/scores/{n}.jsonl" for n in ("brightness", "triple")}
    path = made(f"images={images}", f"scores={files}", "rule.kind=fronts", f"output={tmp_path}/p")
    assert pairs_of(path) == {("a cat", 1.0, 0.0), ("a dog", 1.0, 0.8)}
    rows = pq.read_table(path).to_pylist()
    assert {(row["votes_0"], row["votes_1"]) for row in rows} <= {(2, 0), (0, 2)}


def test_what_has_no_score_is_listed(images, tmp_path, capsys):
    fill(images, {("base", "a dog", 9): 20})
    path = made(f"images={images}", f"output={tmp_path / 'pairs'}")
    assert pairs_of(path) == {("a cat", 1.0, 0.0), ("a dog", 1.0, 0.8)}
    listed = (path.parent / "left_out.jsonl").read_text().splitlines()
    assert len(listed) == 1 and "it has no score brightness" in json.loads(listed[0])["reason"]
    assert "Left out: 1" in capsys.readouterr().out


def test_an_image_that_changed_since_it_was_scored_is_no_side(images, tmp_path):
    fill(images, {("tuned", "a cat", 0): 254})  # in place of 255, and not scored again
    path = made(f"images={images}", f"output={tmp_path / 'pairs'}")
    assert pairs_of(path) == {("a cat", 0.4, 0.0), ("a dog", 1.0, 0.8)}


def test_pairs_that_are_there_are_not_written_over(images, tmp_path):
    made(f"images={images}", f"output={tmp_path / 'pairs'}")
    with pytest.raises(DataError, match="is there already"):
        made(f"images={images}", f"output={tmp_path / 'pairs'}")


def scored_data(folder, output, *more):
    overrides = [f"data.path={folder}", BRIGHTNESS, f"output={output}", *more]
    score.run(config.load(score.ScoreConfig, None, overrides))


@pytest.fixture
def data(tmp_path):
    """Forty prompts of three images each, every two of them labelled: the brighter one won between
    the outer ones, and the darker one next to the middle."""
    pairs = []
    for number in range(40):
        low, middle, high = (
            encoded(solid_image((level, level, number + 1))) for level in (20, 120, 220)
        )
        caption = f"prompt {number}"
        pairs += [Pair(high, low, caption), Pair(middle, high, caption), Pair(low, middle, caption)]
    folder = write_rows(tmp_path / "data/train.parquet", pickapic_rows(pairs)).parent
    scored_data(folder, tmp_path / "scores")
    return folder, tmp_path / "scores/brightness.parquet"


def test_labelled_pairs_of_a_data_set_choose_the_reliable_rule(data, tmp_path, capsys):
    folder, column = data
    scored_data(folder, column.parent, "agreement=true")
    agreed = json.loads(column.with_suffix(".agreement.json").read_text())
    assert agreed["pairs"] == 120 and agreed["accuracy"] == pytest.approx(1 / 3)
    said = capsys.readouterr().out
    assert "Agrees with 33.3% of 120 labelled pairs" in said
    path = made(
        f"data.path={folder}",
        f"scores={{brightness: {column}}}",
        "rule={kind: reliable, rules: [{kind: above_gap}, {kind: best_worst}]}",
        f"output={tmp_path / 'pairs'}",
    )
    assert pq.read_table(path).num_rows == 40
    found = read_provenance(path)["found"]
    assert found["chosen"] == 1 and found["rules"][1]["r_squared"] == pytest.approx(1.0)
    assert found["rules"][0]["pairs"] == 120 and found["rules"][0]["r_squared"] < 0.5
    assert "best_worst (chosen)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ((), "give one of them"),
        (("data.path=x",), r"give scores\.NAME=FILE\.parquet"),
        (("images=x", "rule.kind=reliable"), r"give labelled\.path and labelled\.scores"),
        (("images=x", "labelled={path: x, scores: {a: b}}"), "is for the rule reliable"),
        (("images=x", "rule={kind: rejection, beta: 0}"), "acceptance divides by it"),
    ],
)
def test_contradictions_are_refused(overrides, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        made(*overrides, f"output={tmp_path / 'pairs'}")


def test_a_folder_without_scores_is_told_how_to_get_them(tmp_path):
    fill(tmp_path / "images", LEVELS)
    with pytest.raises(DataError, match="diffalign score images="):
        made(f"images={tmp_path / 'images'}", f"output={tmp_path / 'pairs'}")
    scored(tmp_path / "images")
    with pytest.raises(DataError, match="by is bright, and there are scores brightness"):
        made(f"images={tmp_path / 'images'}", "by=bright", f"output={tmp_path / 'pairs'}")
    with pytest.raises(DataError, match="models names turned"):
        made(f"images={tmp_path / 'images'}", "models=[turned]", f"output={tmp_path / 'pairs'}")
