"""Model cards: read by the hub's own library, and nothing that was typed gets out of its line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffalign import config
from diffalign.errors import DataError
from diffalign.files import write_json_lines
from diffalign.training.card import read_evaluations, results_of, write_cards, write_model_card
from diffalign.training.config import RunConfig

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
NASTY = [
    "a\n---\nlicense: mit\n---\n# b",
    "```\n## Owned\n```",
    "| x | y |\n|---|",
    "<script>alert(1)</script>",
    "{a: [b, 'c\": d",
    "![x](http://example.com/x.png) [y](javascript:z) `code` *bold* # no",
    "\x00\x1b[31m\u2028line\r\nnext",
    "- &anchor !tag %x @y: {}",
]
INTERVAL = {"low": 0.6, "high": 0.8}


def run_config(tmp_path, *overrides, name="run"):
    return dataclasses.replace(
        config.load(RunConfig, SMOKE, list(overrides)), output=tmp_path / name
    )


def comparison(folder: Path, **changes) -> Path:
    row = {
        "scorer": "pickscore",
        "baseline": "base",
        "model": "aligned",
        "items": 144,
        "prompts": 36,
        "win_rate": 0.7,
        "win_rate_interval": INTERVAL,
        "win_rate_ties_half": 0.65,
        "win_rate_ties_half_interval": None,
        "mean_difference": 0.25,
        "mean_difference_interval": {"low": 0.1, "high": 0.4},
        "confidence": 0.95,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps({"comparisons": [row]}))
    Image.new("RGB", (4, 4)).save(folder / "comparison.png")
    return folder


def written(run, *, results=()):
    run.output.mkdir(parents=True, exist_ok=True)
    path = write_model_card(run, run.output, usage=run.model.usage("final"), results=results)
    return ModelCard.load(path)


def headings(card) -> list[str]:
    """Of the text, those within blocks of code left out."""
    found, fence = [], ""
    for line in card.text.split("\n"):
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line[: len(line) - len(line.lstrip("`"))]
        elif line.startswith("#"):
            found.append(line)
    assert not fence
    return found


def test_a_card_says_what_the_hub_asks_for(tmp_path):
    run = run_config(
        tmp_path,
        "model.path=stabilityai/stable-diffusion-xl-base-1.0",
        "data.path=someone/some-preferences",
    )
    data = written(run).data
    assert data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert data.base_model_relation == "adapter"
    assert data.license == "openrail++"
    assert data.datasets == ["someone/some-preferences"]
    assert (data.pipeline_tag, data.library_name) == ("text-to-image", "diffusers")
    assert data.tags == ["diffalign", "preference-optimization", "dpo", "lora"]
    assert data.eval_results is None
    whole = run_config(tmp_path, "model.lora=null", f"model.path={run.model.path}")
    assert written(whole).data.base_model_relation == "finetune"


def test_places_on_this_disk_are_not_published(tmp_path):
    base = tmp_path / "secret place" / "my base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# base\n")
    run = run_config(tmp_path, f"model.path={base}", f"data.path={tmp_path / 'data'}")
    card = written(run)
    assert card.data.base_model is None and card.data.get("base_model_relation") is None
    assert card.data.license == "creativeml-openrail-m"
    assert card.data.datasets is None
    assert str(tmp_path) not in str(card) and "secret place" not in str(card)
    assert "my base" in card.text


def test_results_stand_in_the_metadata_and_in_the_text_with_their_intervals(tmp_path):
    run = run_config(tmp_path)
    run.output.mkdir()
    (run.output / "final").mkdir()
    comparison(run.output / "compared")
    write_json_lines(run.output / "metrics.jsonl", [{"step": 2, "loss": 0.5}])
    for path in write_cards(run, results_of(run.output)):
        card = ModelCard.load(path)
        first, second, third = card.data.eval_results
        assert (first.metric_type, first.metric_value) == ("win_rate", 0.7)
        assert first.metric_args == {**INTERVAL, "confidence": 0.95}
        assert "low" not in second.metric_args
        assert third.metric_name.endswith("aligned against base, by pickscore")
        assert card.data.model_name == "run"
        assert "0.7 (95% interval 0.6 to 0.8)" in card.text
        assert "(grid.png)" in card.text and (path.parent / "grid.png").is_file()
        assert "| loss | 0.5 |" in card.text


def test_what_evaluate_printed_is_read(tmp_path):
    report = tmp_path / "chair.json"
    content = {"benchmark": "chair", "chair_s": 12.5, "recall": None, "confidence": 0.9}
    content["intervals"] = {"chair_s": {"low": 10, "high": 15}, "recall": None}
    report.write_text(json.dumps(content))
    (found,) = read_evaluations(report)
    assert found.spelt == "12.5 (90% interval 10 to 15)"
    card = written(run_config(tmp_path), results=[report])
    assert card.data.eval_results[0].dataset_type == "chair"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"comparisons": [{}]}', '{"comparisons": 3}'])
def test_files_that_hold_no_results_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json: holds no results: give the compare\.json"):
        written(run_config(tmp_path), results=[tmp_path / "x.json"])


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_that_was_typed_gets_out_of_its_line(tmp_path, nasty):
    plain = written(run_config(tmp_path), results=[comparison(tmp_path / "plain")])
    name = nasty.replace("/", "").replace("\x00", "")
    run = dataclasses.replace(run_config(tmp_path, name=name))
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, path=nasty),
        data=dataclasses.replace(run.data, path=nasty),
    )
    results = comparison(tmp_path / "nasty", model=nasty, baseline=nasty, scorer=nasty)
    card = written(run, results=[results])
    assert card.data.to_dict().keys() == plain.data.to_dict().keys() - {"license"}
    assert card.data.license is None
    assert len(card.data.eval_results) == 3
    assert len(headings(card)) == len(headings(plain))
    rows = [line for line in card.text.split("\n") if line.startswith("| win rate")]
    assert len(rows) == 2
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)
    assert "<script" not in card.text.split("```")[0].replace("\\<", "")
