"""Scores of a preference data set's images."""

from __future__ import annotations

import hashlib
import statistics

import pytest
import torch

from diffalign import config
from diffalign.data.score_columns import read_score_column
from diffalign.errors import CacheError, ConfigError, DataError
from diffalign.jobs import score
from diffalign.scorers.repeats import Perturbation
from diffalign.seeding import cpu_generator
from tests.comparison.brightness import Brightness
from tests.layouts import make_pairs, write_folder, write_parquet, write_webdataset

KIND = "scorer.kind=tests.comparison.brightness"


def run(data, output, *more):
    overrides = [f"data.path={data}", f"output={output}", KIND, *more]
    score.run(config.load(score.ScoreConfig, None, overrides))
    return read_score_column(output / "brightness.parquet")


def key(content, pair):
    return hashlib.sha256(content).hexdigest(), pair.caption


@pytest.mark.parametrize("writer", [write_parquet, write_folder])
def test_both_images_of_every_row_get_a_score_under_its_prompt(writer, tmp_path, capsys):
    pairs = make_pairs(3)
    column = run(writer(tmp_path / "data", pairs), tmp_path / "scores", "batch_size=2")
    assert set(column.rows) == {
        key(content, pair) for pair in pairs for content in (pair.chosen, pair.rejected)
    }
    found = column.rows[key(pairs[0].chosen, pairs[0])]
    assert found.score == pytest.approx(200 / 255 / 6, abs=1e-3) and found.deviation is None
    assert column.scorer.kind == "tests.comparison.brightness"
    assert column.scorer.settings == {"scale": 1.0}
    assert column.scorer.fingerprint == "brightness-1.0"
    said = capsys.readouterr().out
    assert "6 images and prompts" in said
    assert "scores: {columns: {brightness: {file: " in said


def test_with_repeats_there_are_means_and_standard_deviations(tmp_path):
    pairs = make_pairs(2)
    column = run(
        write_parquet(tmp_path / "data", pairs),
        tmp_path / "scores",
        "repeats=4",
        "perturbation.crop=0.25",
        "batch_size=3",
    )
    content = pairs[0].chosen
    plain = torch.linspace(0, 1, 32)[None, None].expand(3, 32, 32).clone()
    plain = (plain * torch.tensor([200.0, 0, 0])[:, None, None]).round() / 127.5 - 1
    how, digest = Perturbation(crop=0.25), hashlib.sha256(content).hexdigest()
    copies = torch.stack([how.copy(plain, digest, number) for number in range(4)])
    scores = Brightness().score(copies, ["p"] * 4).tolist()
    found = column.rows[key(content, pairs[0])]
    assert found.score == pytest.approx(statistics.fmean(scores), abs=1e-6)
    assert found.deviation == pytest.approx(statistics.stdev(scores), abs=1e-6)
    assert found.deviation > 0
    assert column.scorer.repeats == 4
    assert column.scorer.perturbation == {"crop": 0.25, "noise": 2.0, "flip": False}


def test_copies_follow_from_the_image_and_stay_near_it():
    pixels = torch.rand(3, 40, 24, generator=cpu_generator(0)) * 2 - 1
    how = Perturbation(crop=0.1, noise=1.0, flip=True)
    assert how.copy(pixels, "a", 0) is pixels
    copies = [how.copy(pixels, "a", number) for number in range(1, 9)]
    assert torch.equal(copies[0], how.copy(pixels, "a", 1))
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], how.copy(pixels, "b", 1))
    assert all(copy.shape == pixels.shape and copy.abs().max() <= 1 for copy in copies)
    still = Perturbation(crop=0.0, noise=0.0)
    assert torch.equal(still.copy(pixels, "a", 3), pixels)
    flat = Perturbation(crop=0.0, noise=2.0).copy(torch.zeros(3, 64, 64), "a", 1)
    assert flat.std().item() == pytest.approx(2 / 127.5, rel=0.05)


def test_what_has_a_score_is_not_scored_again(tmp_path, monkeypatch):
    pairs = make_pairs(3)
    run(write_parquet(tmp_path / "data", pairs[:2]), tmp_path / "scores")
    before = (tmp_path / "scores/brightness.parquet").read_bytes()
    scored = []
    real = Brightness.score

    def counted(self, images, prompts, t=None):
        scored.extend(prompts)
        return real(self, images, prompts, t)

    monkeypatch.setattr(Brightness, "score", counted)
    run(tmp_path / "data", tmp_path / "scores")
    assert scored == [] and (tmp_path / "scores/brightness.parquet").read_bytes() == before
    column = run(write_folder(tmp_path / "more", pairs), tmp_path / "scores", "batch_size=2")
    assert scored == [pairs[2].caption] * 2 and len(column.rows) == 6


def test_an_image_that_cannot_be_read_is_known_as_such(tmp_path):
    pairs = make_pairs(2)
    folder = write_folder(tmp_path / "data", pairs)
    broken = sorted((folder / "win").glob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:40])
    column = run(folder, tmp_path / "scores")
    bad = [row for row in column.rows.values() if row.score is None]
    assert len(column.rows) == 4 and len(bad) == 1 and "image" in bad[0].problem


def test_what_a_scorer_cannot_score_is_named_and_all_else_kept(tmp_path):
    pairs = make_pairs(2)
    folder = write_folder(tmp_path / "data", pairs)
    next(folder.rglob("*0.txt")).write_text("nan")
    with pytest.raises(DataError, match=r"(?s)2 images have no score.*'nan'.*its score is nan"):
        run(folder, tmp_path / "scores")
    assert len(read_score_column(tmp_path / "scores/brightness.parquet").rows) == 2


def test_another_scorer_needs_another_file(tmp_path):
    data = write_parquet(tmp_path / "data", make_pairs(1))
    run(data, tmp_path / "scores")
    with pytest.raises(CacheError, match="Choose another file with name=NAME"):
        run(data, tmp_path / "scores", "scorer.scale=2")
    with pytest.raises(CacheError, match=r"and this is brightness-1.0, 2 copies"):
        run(data, tmp_path / "scores", "repeats=2")


def test_shards_that_are_streamed_are_refused(tmp_path):
    data = write_webdataset(tmp_path / "data", make_pairs(2))
    with pytest.raises(DataError, match="blocks of a stream cannot be read by themselves"):
        run(data, tmp_path / "scores")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "images=FOLDER.* or a data set of pairs"),
        (["images=x", "data.path=y"], "images=FOLDER.* or a data set of pairs"),
        (["data.path=y"], "give output=FOLDER"),
        (["images=x", "output=y"], "leave output out"),
        (["images=x", "perturbation.flip=true"], "repeats is 1, the image itself"),
        (["data.path=y", "output=z", "perturbation.crop=0.5"], "crop must be"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        config.load(score.ScoreConfig, None, [KIND, *settings])
