"""The page of a run in every state, of runs side by side, and how its folder is read."""

from __future__ import annotations

import html
import json
import os
import re
import socket

import pytest
from PIL import Image

from diffalign.errors import ConfigError, DataError
from diffalign.jobs import report
from diffalign.reports.results import result_parts
from diffalign.reports.run_folder import RunFolder, runs_below
from tests.browser import opened
from tests.jobs.folders import fill
from tests.reports.folders import CONFIG, add_previews, rows_of, run_at


def page_of(*runs) -> str:
    return report.run(runs).read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture
def run(tmp_path):
    """A finished run with everything."""
    folder = run_at(tmp_path / "whole", rows_of(40), final=True)
    add_previews(folder, ["a <hat>", "a hen"], (0, 20, 40), suffix=".png")
    says = "the <b>loss</b> on held-out pairs is 0.766"
    verdict = {"step": 20, "verdict": "held_out_worse", "says": says, "figures": {}}
    (folder / "health.jsonl").write_text(json.dumps(verdict) + "\n")
    row = {"scorer": "oracle", "baseline": "base", "model": "aligned", "items": 80, "notes": []}
    row |= {"win_rate": 0.75, "win_rate_interval": {"low": 0.6, "high": 0.85}}
    later = [{"category": "colours", "p_value": 0.0123456}, {"category": "counts", "p_value": 0.5}]
    fill(folder / "evaluation", {("base", "p", 0): 9})
    content = {"comparisons": [row, {**row, "model": "early"}], "categories": later}
    (folder / "evaluation" / "compare.json").write_text(json.dumps(content))
    (folder / "evaluation" / "report.html").write_text("")
    Image.new("RGB", (800, 400)).save(folder / "evaluation" / "comparison.png")
    return folder


def test_a_finished_run_has_every_section_and_asks_nobody(run):
    page = page_of(run)
    assert headings(page) == [
        *("State", "Health", "Curves", "Previews", "Results", "Last figures", "Config"),
        *("Versions", "What to do next"),
    ]
    assert "finished" in page and "40 of 40" in page and "1:02:05" in page
    assert "the &lt;b&gt;loss&lt;/b&gt; on held-out" in page and "<b>loss" not in page
    assert "a &lt;hat&gt;" in page and page.count("data:image/png") == 6
    assert not re.search(r"https?:|<script|@import|url\(", page)
    assert 'href="evaluation/report.html"' in page
    assert f"diffalign export {run}" in page
    assert "diffalign generate" not in page  # it has results


def test_every_row_of_results_is_shown_whatever_it_is_of(run):
    page = page_of(run)
    assert "75.0%" in page and "60.0% to 85.0%" in page
    assert "colours" in page and "0.01235" in page and "p value" in page
    assert "The same in all rows: scorer oracle, baseline base, items 80" in page


def test_a_benchmark_is_a_table_with_its_intervals():
    content = {"benchmark": "chair", "chair_i": 12.345, "intervals": {"chair_i": None}}
    content["intervals"] = {"chair_i": {"low": 10.1, "high": 14.9}}
    shown = "".join(result_parts(content))
    assert "chair i" in shown and "12.35" in shown and "10.1 to 14.9" in shown


def test_a_single_row_is_told_from_top_to_bottom():
    row = {"scorer": "oracle", "win_rate": 0.75, "win_rate_interval": {"low": 0.6, "high": 0.85}}
    row["holm"] = None
    shown = re.sub(r"<[^>]*>|\s", "|", "".join(result_parts({"comparisons": [row]})))
    assert re.search(r"scorer\|+oracle\|+win\|rate\|+75\.0%\|+60\.0%\|to\|85\.0%", shown)
    assert "holm" not in shown


def test_figures_of_several_models_stand_side_by_side(tmp_path):
    figure = {"label": "CHAIR-s", "unit": "percent", "value": 31.33, "interval": [24.41, 39.21]}
    models = {"base": {"chair_s": figure, "words": {"label": "words", "value": None}}}
    models["aligned"] = {"chair_s": {**figure, "value": 4, "interval": None}}
    folder = run_at(tmp_path / "run", rows_of(20), final=True)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "responses.json").write_text(json.dumps(models))
    Image.new("RGB", (60, 40)).save(folder / "evaluation" / "descriptions.png")
    page = page_of(folder)
    shown = re.sub(r"<[^>]*>", "|", page)
    assert "CHAIR-s||31.3% (24.4 to 39.2)||4.0%" in shown and "words||undefined|||" in shown
    assert "what is wrong is red" in page
    models["aligned"]["chair_s"] = 4
    assert "Results" not in headings(page_of(folder_with(tmp_path, models)))


def folder_with(tmp_path, content):
    """A run next to JSON of somebody else's."""
    folder = run_at(tmp_path / "other", rows_of(20), final=True)
    (folder / "notes.json").write_text(json.dumps(content))
    return folder


def test_accuracies_of_the_terms_of_a_sum_are_told_where_there_is_no_other(tmp_path):
    rows = [{"step": 10, "loss": 0.6, "dpo/accuracy": 0.9, "accuracy/chosen_shorter": 0.7}]
    page = page_of(run_at(tmp_path / "run", rows))
    assert "Accuracy, dpo" in page and "90.0%" in page
    assert page.index("dpo/accuracy") < page.index("All other figures")


def test_what_is_asked_next_opens_an_adapter_as_it_was_trained(tmp_path):
    lora = {"rank": 64, "alpha": 128, "start": None, "seed": 3, "dora": False}
    config = {"model": {"kind": "vlm", "path": "base", "lora": lora}, "responses": {"path": "x"}}
    folder = run_at(tmp_path / "run", rows_of(20), final=True, config=config)
    assert f"model.lora={{alpha: 128, rank: 64, start: {folder}}}" in html.unescape(page_of(folder))


@pytest.mark.parametrize("kept", range(5))
def test_a_run_without_some_parts_has_a_page(tmp_path, kept):
    folder = run_at(tmp_path / "run", rows_of(20) if kept > 0 else ())
    if kept > 1:
        add_previews(folder, ["a hat"], (0, 20), suffix=".txt")
    if kept > 2:
        (folder / "rounds" / "round-0000").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "rounds" / "round-0000" / "grid.png")
    if kept > 3:
        (folder / "final").mkdir()
    page = page_of(folder)
    assert ("Curves" in headings(page)) == (kept > 0)
    assert ("step 20: &lt;i&gt;a hat" in page) == (kept > 1)
    assert ("Samples of round-0000" in page) == (kept > 2)
    assert ("round/oracle_mean" in page) == (kept > 0)
    assert ("--resume" in page) == (kept <= 3)
    state = ("not started", "stopped", "stopped", "stopped", "finished")[kept]
    assert f'<div class="value">{state}</div>' in page


def test_a_run_that_goes_on_is_said_to(tmp_path):
    folder = run_at(tmp_path / "run", rows_of(20))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # in the middle of being written
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "now", "command": "x"}
    (folder / ".holder.json").write_text(json.dumps(holder))
    found = RunFolder.at(folder)
    assert (found.status, found.step, found.problems) == ("running", 20, [])
    (folder / ".holder.json").write_text(json.dumps({**holder, "pid": 2**22 + 1}))
    assert RunFolder.at(folder).status == "stopped"


def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path, capsys):
    folder = run_at(tmp_path / "run", rows_of(20))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n[1]\n{"step": 30, "loss": NaN}\n')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "compare.json").write_text("{")
    page = page_of(folder)
    assert headings(page)[0] == "What could not be read"
    assert "metrics.jsonl: 2 lines are no JSON objects" in page
    assert "evaluation/compare.json" in page
    assert "2 lines are no JSON objects" in capsys.readouterr().out
    assert RunFolder.at(folder).last("loss") == pytest.approx(0.65)  # the last that is finite


def test_two_runs_share_charts_and_differ_in_settings(run, tmp_path):
    config = {**CONFIG, "objective": {"kind": "ipo", "beta": 500.0}}
    other = run_at(tmp_path / "other", rows_of(30), config=config)
    path = report.run([run, other])
    assert path == run / "report-with-other.html"
    page = path.read_text()
    charts = re.findall(r'<figure class="chart">.*?</figure>', page, re.DOTALL)
    (chart,) = [each for each in charts if "<strong>loss<" in each]
    assert chart.count("<polyline") == 2 and "whole" in chart and "other" in chart
    assert "objective.kind" in page and "ipo" in page
    assert "optimizer.lr</td>" not in page
    assert "What to do next" not in headings(page)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not the folder of a training run"):
        report.run([tmp_path])
    folder = run_at(tmp_path / "run")
    with pytest.raises(ConfigError, match="the same run twice"):
        report.run([folder, folder])
    with pytest.raises(ConfigError, match="1 to 6 folders of runs, got 0"):
        report.run([])


def test_runs_are_found_below_a_folder_and_not_within_runs(tmp_path):
    for name in ("b/c", "a", "b/c/inner", "b/d/e/f/too-deep"):
        run_at(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in runs_below(tmp_path)]
    assert found == ["a", "b/c"]
    assert runs_below(tmp_path / "a") == [tmp_path / "a"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_the_page_on_a_phone(run, scheme):
    look = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with opened(report.run([run]).as_uri(), **look) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.click("nav a:has-text('Previews')")
        widths = "[...document.querySelectorAll('.frames td img')].map((i) => i.naturalWidth)"
        assert tab.evaluate(widths) == [16] * 6
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(252, 252, 250)", "dark": "rgb(22, 24, 28)"}[scheme]
