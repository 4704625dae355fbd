"""The compare job whole: from scores to numbers and a page."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.evidence import holm
from diffalign.files import write_json
from diffalign.generation.manifest import append_rows, read_manifest
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


def test_every_model_is_held_against_every_other_with_corrected_p_values(folder, capsys):
    aligned, same = run(folder)
    content = json.loads((folder / "compare.json").read_text())
    (pair,) = content["pairs"]
    assert (pair["baseline"], pair["model"], pair["wins"]) == ("aligned", "same", 16)
    rows = [*content["comparisons"], pair]
    assert [row["holm"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))
    assert aligned.holm > aligned.comparison.p_value and same.holm == 1
    said, summary = capsys.readouterr().out, (folder / "summary.md").read_text()
    for output in (said, summary, (folder / "report.html").read_text()):
        assert "Every model against every other by brightness" in output
        assert "0 of 3 pairs are told apart" in output
        assert "To see a win rate of 55% in 80% of comparisons takes" in " ".join(output.split())

    (alone, _) = run(folder, "pairs=baseline")
    assert alone.holm == pytest.approx(2 * alone.comparison.p_value)
    assert json.loads((folder / "compare.json").read_text())["pairs"] == []


def test_a_comparison_that_grows_says_how_often_it_was_looked_at(folder, capsys):
    levels = {(m, f"new {i}", 0): 9 + i for m in ("base", "aligned", "same") for i in range(9)}
    run(folder)
    assert "looked at before" not in capsys.readouterr().out
    run(folder)
    assert "looked at before" not in capsys.readouterr().out
    fill(folder, levels)
    run_scorer(folder)
    aligned, _ = run(folder)
    assert aligned.looks.pairs == (48, 57)
    assert 0.9 < aligned.looks.held < 0.95 < aligned.looks.needed
    for output in (capsys.readouterr().out, (folder / "summary.md").read_text()):
        assert "looked at before, with 48 pairs" in " ".join(output.split())
    rows = json.loads((folder / "compare.json").read_text())["comparisons"]
    assert [row["looks"] for row in rows] == [[48, 57], [48, 57]]


@pytest.mark.parametrize("content", ["[]", '{"comparisons": [{"scorer": 1}]}', "{"])
def test_a_file_of_that_name_that_is_no_result_is_left_alone(folder, content):
    (folder / "compare.json").write_text(content)
    with pytest.raises(DataError, match=r"compare\.json.*(is no result of|JSON)"):
        run(folder)
    assert (folder / "compare.json").read_text() == content


def test_categories_of_a_prompt_file_are_reported(folder, tmp_path, capsys):
    lines = [f"{prompt},{'third' if i % 3 == 0 else 'other'}" for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "mine.csv").write_text("\n".join(["prompt,Kind", *lines]))
    given = f"prompts={{file: {tmp_path / 'mine.csv'}, categories: [Kind]}}"
    aligned, _ = run(folder, given)
    third, other = aligned.categories
    assert (third.kind, third.category, third.comparison.win_rate) == ("Kind", "third", 0.0)
    assert (other.category, other.comparison.win_rate, other.comparison.prompts) == ("other", 1, 16)
    for output in (capsys.readouterr().out, (folder / "summary.md").read_text()):
        assert "By Kind, brightness" in output and "mean of categories" in output
        assert "50.0%" in output  # of the two; of all prompts it is 66.7 %
    with pytest.raises(ConfigError, match="none of its prompts with a category"):
        run(folder, f"prompts={tmp_path / 'mine.csv'}")


def test_categories_of_the_manifest_are_reported_and_diversity_is_shown(folder, capsys):
    rows = [replace(row, categories={"style": "photo"}) for row in read_manifest(folder)]
    append_rows(folder, rows)
    write_json(folder / "scores/brightness.diversity.json", {"vendi_score": {"base": 1.25}})
    aligned, _ = run(folder)
    assert [each.category for each in aligned.categories] == ["photo"]
    said = " ".join(capsys.readouterr().out.split())
    assert "By style, brightness" in said
    assert "Diversity by the features of brightness" in said and "1.2500" in said


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
        (
            "models=[base]",
            r"needs a baseline and .*Generate the same prompts",
        ),
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
