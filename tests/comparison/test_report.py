from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from diffalign.comparison.compare import compare_scores
from diffalign.comparison.report import (
    as_json,
    as_markdown,
    console_table,
    markdown_text,
    numbers_section,
)
from diffalign.comparison.results import Result, contradictions


@pytest.fixture
def result() -> Result:
    before = {(f"p{i}", s): 0.25 for i in range(30) for s in range(2)}
    after = {place: 0.75 if i % 3 else 0.0 for i, place in enumerate(before)}
    del after["p0", 1]
    comparison = compare_scores(before, after)
    return Result(scorer="oracle", baseline="base", model="aligned", comparison=comparison)


def spoken(result: Result) -> str:
    console = Console(width=80, file=None)
    with console.capture() as capture:
        console.print(console_table(result))
    return capture.get()


def test_the_console_table_fits_80_columns_without_wrapping(result):
    lines = spoken(result).splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("aligned against base by oracle: 59 pairs, 30 prompts")
    assert "39, 0, 20" in lines[2]
    assert "66.1%" in lines[3]


def test_missing_items_are_a_warning_by_name(result):
    assert result.warnings == ["1 items are left out, aligned has no score for them: p0 seed 1"]


def test_json_holds_all_numbers_and_what_is_missing(result):
    content = json.loads(as_json([result], {"resamples": 10_000}))
    (row,) = content["comparisons"]
    assert content["resamples"] == 10_000
    assert row["model"] == "aligned"
    assert row["wins"] == 39
    assert row["win_rate"] == pytest.approx(39 / 59)
    assert row["win_rate_interval"].keys() == {"low", "high"}
    assert row["missing_model"] == [["p0", 1]]


def test_undefined_values_are_null_in_json_and_words_elsewhere():
    tied = compare_scores({("p", 0): 1.0}, {("p", 0): 1.0})
    result = Result(scorer="oracle", baseline="base", model="aligned", comparison=tied)
    (row,) = json.loads(as_json([result], {}))["comparisons"]
    assert row["win_rate"] is None
    assert row["mean_difference_interval"] is None
    assert "undefined" in spoken(result)
    assert "undefined (no interval)" in as_markdown([result], "grid.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain-1.5+b", "plain-1.5+b"),
        ("a|b", r"a\|b"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("[x](javascript:y)", r"\[x\](javascript:y)"),
        ("![x](https://x.org)", r"\!\[x\](https\://x.org)"),
        ("a\n# b\r\n|c|", r"a \# b \|c\|"),
        ("`rm` *b* _c_ &lt;", r"\`rm\` \*b\* \_c\_ \&lt;"),
        ("\\|", r"\\\|"),
    ],
)
def test_a_name_in_markdown_is_text(name, shown):
    assert markdown_text(name) == shown


def test_names_cannot_break_out_of_the_table(result):
    result = replace(result, model="evil | x |\n\n<script>", baseline="[b](c)", scorer="|")
    page = as_markdown([result], "grid.png").splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in page[:3]]
    assert cells == [10, 10, 10]
    assert "<script>" not in "\n".join(page)


@pytest.mark.parametrize("models", [1, 2])
def test_a_small_p_value_reads_as_one_on_the_page(models):
    base = {(f"p{i}", 0): 0.0 for i in range(30)}
    comparison = compare_scores(base, dict.fromkeys(base, 1.0))
    result = Result(scorer="oracle", baseline="base", model="aligned", comparison=comparison)
    content = "".join(numbers_section([result] * models).parts)
    assert "p &lt; 0.001" in content and "&amp;" not in content


def test_markdown_is_a_table_with_the_grid_below(result):
    page = as_markdown([result, result], "grid.png").splitlines()
    assert page[0].count("|") == page[1].count("|") == page[2].count("|") == page[3].count("|")
    assert "39 / 0 / 20" in page[2]
    assert any(line.startswith("- aligned by oracle: 1 items are left out") for line in page)
    assert page[-1] == "![prompts down, models across](grid.png)"


def scored_by(scorer: str, gain: float, spread: float = 0.1, model: str = "aligned") -> Result:
    """A model whose scores differ from the base's by about a gain."""
    before = {(f"p{i}", 0): 0.5 for i in range(30)}
    after = {place: 0.5 + gain + spread * (i % 3 - 1) for i, place in enumerate(before)}
    comparison = compare_scores(before, after, resamples=500)
    return Result(scorer=scorer, baseline="base", model=model, comparison=comparison)


def test_scorers_that_contradict_each_other_are_told_in_every_output():
    results = [scored_by("jpeg", 0.3), scored_by("oracle", -0.2), scored_by("clip", 0.01)]
    (said,) = contradictions(results)
    assert said.startswith("aligned is better than base by jpeg (+0.3) and worse by oracle (-0.2)")
    assert "reward hacking" in said and "clip" not in said
    assert json.loads(as_json(results, {}))["contradictions"] == [said]
    assert "is better than base by jpeg" in as_markdown(results, "grid.png")
    assert "is better than base by jpeg" in "".join(numbers_section(results).parts)


def test_scorers_that_agree_or_may_do_so_are_not():
    assert contradictions([scored_by("jpeg", 0.3), scored_by("oracle", 0.2)]) == []
    assert contradictions([scored_by("jpeg", 0.3), scored_by("oracle", -0.01)]) == []
    others = [scored_by("jpeg", 0.3), scored_by("oracle", -0.2, model="another")]
    assert contradictions(others) == []
    assert contradictions([scored_by("oracle", -0.2)]) == []
