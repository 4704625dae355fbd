"""The compare job whole: from scores to numbers and a page."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.jobs import compare, score
from tests.jobs.folders import fill

PROMPTS = [f"prompt {i:02}" for i in range(24)]


@pytest.fixture
def folder(tmp_path):
    """The aligned model is brighter for two prompts out of three, darker for the others."""
    levels = {}
    for i, prompt in enumerate(PROMPTS):
        for seed in (0, 1):
            levels["base", prompt, seed] = 102
            levels["aligned", prompt, seed] = 204 if i % 3 else 51
            levels["same", prompt, seed] = 102
    fill(tmp_path, levels)
    run_scorer(tmp_path)
    return tmp_path


def run_scorer(folder, *more: str) -> None:
    overrides = [f"images={folder}", "scorer.kind=tests.comparison.brightness", *more]
    score.run(config.load(score.ScoreConfig, None, overrides))


def run(folder, *more: str):
    overrides = [f"images={folder}", "resamples=500", *more]
    return compare.run(config.load(compare.CompareConfig, None, overrides))


def test_numbers_reach_every_output(folder, capsys):
    aligned, same = run(folder)
    c = aligned.comparison
    assert (aligned.baseline, aligned.model, same.model) == ("base", "aligned", "same")
    assert (c.wins, c.ties, c.losses) == (32, 0, 16)
    assert c.win_rate == pytest.approx(2 / 3)
    assert c.mean_difference == pytest.approx((2 * 0.4 - 0.2) / 3)
    assert same.comparison.win_rate is None

    rows = json.loads((folder / "compare.json").read_text())["comparisons"]
    assert [row["wins"] for row in rows] == [32, 0]
    page = (folder / "report.html").read_text()
    summary = (folder / "summary.md").read_text()
    said = capsys.readouterr().out
    for output in (page, summary, said):
        assert "66.7%" in output
        assert "Every pair is a tie" in output
    with Image.open(folder / "comparison.png") as grid:
        assert grid.height > 8 * 192
    assert "report.html in a browser" in said


def test_the_page_shows_wins_losses_settings_and_commands(folder):
    run(folder, "models=[aligned]", "gallery=2")
    page = (folder / "report.html").read_text()
    assert "Biggest wins of aligned" in page
    assert "Biggest losses of aligned" in page
    assert page.count('class="card"') == 4
    assert "weights-aligned" in page
    assert f"diffalign compare {folder / 'compare.yaml'}" in page


def test_the_written_config_repeats_the_numbers(folder):
    run(folder)
    before = (folder / "compare.json").read_bytes()
    compare.run(config.load(compare.CompareConfig, folder / "compare.yaml"))
    assert (folder / "compare.json").read_bytes() == before


def test_baseline_and_output_may_be_chosen(folder, tmp_path):
    (result,) = run(folder, "baseline=aligned", "models=[base]", f"output={tmp_path / 'elsewhere'}")
    assert (result.comparison.wins, result.comparison.losses) == (16, 32)
    assert (tmp_path / "elsewhere" / "report.html").is_file()
    assert not (folder / "report.html").exists()


def test_every_column_is_compared_unless_some_are_named(folder):
    run_scorer(folder, "scorer.scale=3", "name=triple")
    assert [r.scorer for r in run(folder, "models=[aligned]")] == ["brightness", "triple"]
    (result,) = run(folder, "models=[aligned]", "scorers=[triple]", "tie_tolerance=0.9")
    assert (result.comparison.wins, result.comparison.ties) == (32, 16)


def test_images_without_a_score_are_counted_and_named(tmp_path, capsys):
    levels = {(m, p, 0): 9 for m in ("base", "aligned") for p in PROMPTS}
    del levels["aligned", PROMPTS[3], 0]
    levels["aligned", "nan", 0] = 9
    fill(tmp_path, levels)
    with pytest.raises(DataError):
        run_scorer(tmp_path)
    (result,) = run(tmp_path)
    assert result.comparison.items == 23
    assert result.comparison.missing_model == (("nan", 0), ("prompt-03", 0))
    assert result.comparison.missing_baseline == (("nan", 0),)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 items are left out, aligned has no score for them: nan seed 0, prompt-03" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline=nobody", r"no images of a model named 'nobody' \(models: base, aligned, same"),
        ("models=[base]", "needs a baseline and at least one other model"),
        ("scorers=[taste]", r"no column 'taste' \(columns: brightness\)"),
        ("confidence=95", "confidence must be above 0 and below 1"),
        ("tie_tolerance=-1", "tie_tolerance must be at least 0"),
        ("resamples=10", "resamples must be at least 100"),
    ],
)
def test_impossible_comparisons_are_refused(folder, override, message):
    with pytest.raises(ConfigError, match=message):
        run(folder, override)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    for job in (run, run_scorer):
        with pytest.raises(DataError, match="there is no such folder"):
            job(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_names_in_brackets_are_printed_whole(tmp_path, capsys):
    folder = tmp_path / "look [a]"
    fill(folder, {(m, p, 0): 0 for m in ("base", "aligned") for p in "ab"})
    run_scorer(folder)
    run(folder)
    (done,) = [line for line in capsys.readouterr().out.splitlines() if "report.html, " in line]
    assert str(folder / "report.html") in done


def test_without_scores_the_next_command_is_named(tmp_path):
    fill(tmp_path, {("base", "a", 0): 0, ("aligned", "a", 0): 0})
    with pytest.raises(DataError, match=rf"(?s)no scores yet.*diffalign score images={tmp_path}"):
        run(tmp_path)


def test_a_model_that_one_column_lifts_and_another_lowers_is_told(folder, capsys):
    run(folder)
    assert "reward hacking" not in capsys.readouterr().out
    run_scorer(folder, "scorer.scale=-1", "name=darkness")
    run(folder)
    said = capsys.readouterr().out
    assert "aligned is better than base by brightness (+0.2) and worse by darkness (-0.2)" in said
    assert "same is better" not in said
