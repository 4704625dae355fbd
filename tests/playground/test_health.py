"""A run of the playground whose learning rate is too high ends itself before it does much harm."""

from __future__ import annotations

import pytest

from diffalign.files import read_json_lines
from tests.runs import SCRIPTS, figures, forget_accelerate, run_script


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_named_live(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(SCRIPTS.parent)
    run_script("check_health.py", "bad_rate", "--out", tmp_path)
    forget_accelerate()
    said = capsys.readouterr().out
    told = read_json_lines(tmp_path / "bad_rate/health.jsonl")
    assert told[0]["verdict"] == "rate_too_high" and told[0]["step"] < 120
    assert figures(tmp_path / "bad_rate")[-1]["step"] == told[0]["step"]
    assert f"Stopped after step {told[0]['step']:.0f} by training.health, saved: " in said
    assert "training.health=warn --resume" in " ".join(said.split())
    assert "1 of 1 as they should be" in said
    assert not (tmp_path / "bad_rate/final").exists()
