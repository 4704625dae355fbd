from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.generation.text_to_image import SamplerConfig
from diffalign.jobs import demo
from diffalign.jobs.demo import DemoConfig


@pytest.fixture
def short(tmp_path, monkeypatch) -> DemoConfig:
    """The demo with two training steps, and images of two denoising steps."""
    monkeypatch.chdir(Path(__file__).parents[2])
    return DemoConfig(
        output=tmp_path / "demo",
        overrides=(
            "training.optimizer_steps=2",
            "training.samples_per_device=2",
            "optimizer.warmup_steps=0",
            "data.workers=0",
        ),
        seeds=1,
        sampler=SamplerConfig(steps=2, guidance=1.0),
    )


def test_the_demo_names_what_it_made_and_the_next_command(short, capsys):
    demo.run(short)
    said = capsys.readouterr().out
    evaluation = short.output / "evaluation"
    for path in (evaluation / "comparison.png", evaluation / "report.html", short.output / "final"):
        assert path.exists() and str(path) in said
    assert "diffalign train configs/diffusion_dpo/sdxl_lora_24gb.yaml" in said
    (comparison,) = json.loads((evaluation / "compare.json").read_text())["comparisons"]
    assert (comparison["items"], comparison["prompts"]) == (36, 36)

    demo.run(short)  # a second time nothing is trained or generated again
    again = " ".join(capsys.readouterr().out.split())
    assert "is there already" in again and "0 to generate" in again
