"""The score job whole: a folder, a scorer, a column."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.comparison.score import read_column
from diffalign.errors import CacheError, ConfigError, DataError
from diffalign.files import read_json_lines
from diffalign.generation.manifest import file_digest
from diffalign.imaging.image_files import pixels_of, read_image
from diffalign.jobs import score
from diffalign.scorers.jpeg import JPEG
from diffalign.scorers.repeats import Perturbation
from tests.comparison.brightness import Brightness
from tests.jobs.folders import fill

KIND = "scorer.kind=tests.comparison.brightness"


def run(images, *more: str) -> None:
    score.run(config.load(score.ScoreConfig, None, [f"images={images}", KIND, *more]))


def test_a_generated_folder_gets_a_column_and_means(tmp_path, capsys):
    fill(tmp_path, {("base", "a", 0): 0, ("base", "a", 1): 51, ("best", "a", 0): 255})
    run(tmp_path)
    assert sorted(read_column(tmp_path / "scores" / "brightness.jsonl").values()) == pytest.approx(
        [0.0, 0.2, 1.0]
    )
    said = capsys.readouterr().out
    assert "base" in said and "0.1000" in said
    assert f"diffalign compare images={tmp_path}" in said


def test_a_second_run_changes_nothing_and_the_written_config_repeats_it(tmp_path, capsys):
    fill(tmp_path, {("base", "a", 0): 0})
    run(tmp_path, "scorer.scale=2")
    said = capsys.readouterr().out  # there is nothing yet to compare the one model with
    assert "Next: generate the same prompts with another model" in said
    column = tmp_path / "scores" / "brightness.jsonl"
    before = column.read_bytes()
    score.run(config.load(score.ScoreConfig, column.with_suffix(".yaml")))
    assert column.read_bytes() == before


def test_another_scorer_needs_another_column(tmp_path):
    fill(tmp_path, {("base", "a", 0): 255})
    run(tmp_path)
    with pytest.raises(CacheError, match="Choose another column with name=NAME"):
        run(tmp_path, "scorer.scale=2")
    run(tmp_path, "scorer.scale=2", "name=double")
    assert list(read_column(tmp_path / "scores" / "double.jsonl").values()) == [2.0]


def test_a_folder_of_captioned_images_is_enough(tmp_path, capsys):
    Image.new("RGB", (8, 8), (255,) * 3).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a white square")
    run(tmp_path)
    assert list(read_column(tmp_path / "scores" / "brightness.jsonl").values()) == [1.0]
    assert "diffalign compare" not in capsys.readouterr().out


def test_what_has_no_score_is_named_at_the_end(tmp_path):
    fill(tmp_path, {("base", "nan", 0): 0, ("base", "good", 0): 255})
    with pytest.raises(DataError, match=r"(?s)1 image has no score.*nan-0\.png: its score is"):
        run(tmp_path)
    assert list(read_column(tmp_path / "scores" / "brightness.jsonl").values()) == [1.0]


def test_a_batch_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        run(tmp_path, "batch_size=0")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", "a\0"])
def test_a_name_that_would_leave_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="becomes a file"):
        score.ScoreConfig(images=tmp_path, scorer=JPEG(), name=name)


def test_with_repeats_there_are_means_and_standard_deviations(tmp_path):
    images = {("base", "a", 0): 0, ("base", "b", 0): 128, ("best", "a", 0): 255}
    fill(tmp_path, images)
    run(tmp_path, "repeats=5", "perturbation.noise=20", "batch_size=4")
    column = tmp_path / "scores" / "brightness.jsonl"
    rows = read_json_lines(column)
    scorer, how = Brightness(), Perturbation(noise=20.0)
    for row in rows:
        (file,) = (
            f for f in tmp_path.rglob("*.png") if file_digest(f.read_bytes()) == row["image"]
        )
        pixels = pixels_of(read_image(file))
        copies = torch.stack([how.copy(pixels, row["image"], number) for number in range(5)])
        scores = scorer.score(copies, [row["prompt"]] * 5).double()
        assert row["score"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert row["deviation"] == pytest.approx(scores.std().item(), abs=1e-6)
    assert sum(row["deviation"] > 1e-4 for row in rows) == 3
    before = column.read_bytes()
    run(tmp_path, "repeats=5", "perturbation.noise=20")
    assert column.read_bytes() == before
    with pytest.raises(CacheError, match="5 copies by"):
        run(tmp_path)
    run(tmp_path, "name=once")
    assert "deviation" not in read_json_lines(tmp_path / "scores" / "once.jsonl")[0]
