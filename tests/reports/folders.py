"""Folders of runs without a model: what `train` writes, by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

CONFIG = {
    "model": {"kind": "sdxl", "path": "assets/playground/sdxl"},
    "data": {"path": "pairs"},
    "responses": None,
    "rollouts": None,
    "objective": {"kind": "dpo", "beta": 500.0},
    "optimizer": {"kind": "adamw", "lr": 3e-5},
    "training": {"optimizer_steps": 40},
}


def run_at(
    folder: Path,
    rows: Sequence[Mapping[str, float]] = (),
    *,
    final: bool = False,
    config: Mapping[str, object] = CONFIG,
) -> Path:
    """A run with figures, and its result if it is finished."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    if rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines)
        (folder / "timing.jsonl").write_text(
            json.dumps({"step": 10, "seconds": 3725.2, "samples_per_second": 12.5}) + "\n"
        )
    if final:
        (folder / "final").mkdir()
    return folder


def add_previews(folder: Path, captions: Sequence[str], steps: Sequence[int], *, suffix: str):
    """Images or texts of every caption and step."""
    previews = folder / "previews"
    previews.mkdir()
    (previews / "previews.json").write_text(json.dumps({"captions": list(captions)}))
    for step in steps:
        for number, caption in enumerate(captions):
            place = previews / f"step-{step:08d}-{number}{suffix}"
            if suffix == ".txt":
                place.write_text(f"step {step}: <i>{caption}</i>")
            else:
                Image.new("RGB", (16, 16), (step, 0, 0)).save(place)


def rows_of(steps: int, every: int = 10) -> list[dict[str, float]]:
    """Figures of a run of so many steps, with an evaluation before the first one."""
    first = {"step": 0, "held_out/accuracy": 0.5, "held_out/accuracy_low": 0.4}
    rows: list[dict[str, float]] = [{**first, "held_out/accuracy_high": 0.6}]
    for step in range(every, steps + 1, every):
        rows.append({"step": step, "samples": 16 * step, "loss": 0.7 - step / 400, "accuracy": 0.5})
        rows[-1] |= {"round/oracle_mean": step / 10} if step % 20 == 0 else {}
    return rows
