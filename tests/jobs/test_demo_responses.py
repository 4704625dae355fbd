from __future__ import annotations

import json
from pathlib import Path

from diffalign.files import read_json_lines
from diffalign.jobs import demo_responses as demo_responses
from diffalign.jobs import diagnose
from diffalign.jobs.demo_responses import ResponsesDemoConfig


def test_it_names_what_it_made_and_the_next_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    short = ResponsesDemoConfig(
        output=tmp_path / "demo",
        overrides=(
            "training.optimizer_steps=2",
            "training.samples_per_device=2",
            "optimizer.warmup_steps=0",
        ),
        scenes=3,
    )
    demo_responses.run(short)
    said = capsys.readouterr().out
    evaluation = short.output / "evaluation"
    for path in (evaluation / "descriptions.png", evaluation / "responses.json"):
        assert path.exists() and str(path) in said
    assert "diffalign train configs/mdpo/llava15_7b.yaml" in said
    figures = json.loads((evaluation / "responses.json").read_text())
    assert figures.keys() == {"base", "aligned"}
    assert set(demo_responses.SHOWN) <= figures["base"].keys()

    rows = read_json_lines(short.output / "metrics.jsonl")
    told = {"top_entropy", "top_mass", "displaced", "fell/chosen"}
    assert told <= next(row for row in rows if "loss" in row).keys()

    page = diagnose.run(diagnose.DiagnoseConfig(run=short.output, samples=2))
    assert page == short.output / "diagnosis.html"
    assert "diagnosis.html in a browser" in " ".join(capsys.readouterr().out.split())
    text = page.read_text()
    assert text.count('class="card diagnosed"') == 2
    assert text.count("looked at for") == 4 and text.count('class="words"') == 4
    assert "Describe the picture." in text and "://" not in text

    demo_responses.run(short)  # a second time nothing is trained again
    assert "is there already" in " ".join(capsys.readouterr().out.split())
