from __future__ import annotations

import io
import json

from rich.console import Console

from diffalign.training.hooks.records import JsonLines, TrainingProgress


def test_rows_after_a_step_and_a_torn_last_line_are_forgotten(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        file.write({"step": step, "loss": 0.5})
    with file.path.open("a") as torn:
        torn.write('{"step": 4, "lo')
    file.truncate_after(4)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [2, 4]


def test_without_a_terminal_figures_are_plain_lines():
    text = io.StringIO()
    progress = TrainingProgress(Console(file=text), total=10, start=0, unit_per_step=4)
    progress.advance(4)
    assert progress.samples_per_second == 0.0  # the first step is no rate to go by
    progress.advance(5)
    progress.figures(5, {"loss": 0.69, "accuracy": 0.75, "drift/chosen": -0.001})
    line = text.getvalue()
    assert "step 5/10  loss 0.6900  accuracy 75%  chosen -1.0e-03" in line
    assert "samples/s" in line and "left" in line


def test_each_term_of_a_sum_shows_how_often_it_is_right():
    text = io.StringIO()
    progress = TrainingProgress(Console(file=text), total=10, start=0, unit_per_step=4)
    progress.figures(5, {"loss": 0.69, "dpo/accuracy": 0.75, "image/accuracy": 0.5})
    assert "loss 0.6900  dpo accuracy 75%  image accuracy 50%" in text.getvalue()
