"""Write the demos' figures into README.md and docs/results.md, and their images into assets/demo.

    bash scripts/demo.sh
    .venv/bin/diffalign demo --vlm
    .venv/bin/python scripts/update_readme.py

Only what is between the two markers of a page is replaced.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from pages import figure, fill
from PIL import Image

from diffalign import config
from diffalign.comparison.report import percent
from diffalign.jobs.demo_responses import SHOWN
from diffalign.training.config import RunConfig

PAGES = ("README.md", "docs/results.md")


def images_table(run: Path) -> str:
    """What the demo of images measured, as Markdown."""
    (c,) = json.loads((run / "evaluation/compare.json").read_text())["comparisons"]
    rate, gain = c["win_rate_interval"], c["mean_difference_interval"]
    return (
        f"| {c['items']} held-out images, {c['prompts']} prompts | base | aligned |\n"
        f"|---|---|---|\n"
        f"| prompt fidelity, by the oracle | {percent(c['baseline_mean'])} "
        f"| {percent(c['model_mean'])} |\n"
        f"| gain, 95 % interval | | {percent(c['mean_difference'])} "
        f"({percent(gain['low'])} to {percent(gain['high'])}) |\n"
        f"| wins / ties / losses | | {c['wins']} / {c['ties']} / {c['losses']} |\n"
        f"| win rate of decided pairs, 95 % interval | | {percent(c['win_rate'])} "
        f"({percent(rate['low'])} to {percent(rate['high'])}) |\n\n"
        f"Diffusion-DPO, {how_trained(run)}, by `bash scripts/demo.sh`.\n"
    )


def responses_table(run: Path) -> str:
    """What the demo of responses measured, as Markdown."""
    models = json.loads((run / "evaluation/responses.json").read_text())
    rows = []
    for name in SHOWN:
        figures = [figure(of[name]) for of in models.values()]
        rows.append(f"| {figures[0].label} | {' | '.join(one.spelt for one in figures)} |")
    what = "unseen scenes; percent, and words; 95 % intervals"
    header = f"| {what} | {' | '.join(models)} |\n|---|---|---|\n"
    method = f"mDPO, {how_trained(run)}, by `diffalign demo --vlm`.\n"
    return header + "\n".join(rows) + "\n\n" + method


def how_trained(run: Path) -> str:
    """Steps, pairs, seconds and the machine."""
    training = config.load(RunConfig, run / "config.yaml").training
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    batch = training.samples_per_device * training.accumulation
    seconds = training.optimizer_steps * batch / timing[-1]["samples_per_second"]
    return (
        f"{training.optimizer_steps} steps of {batch} pairs in {seconds:.0f} s on "
        f"{torch.get_num_threads()} cores ({platform.machine()}, torch {torch.__version__})"
    )


def keep(image: Path, name: str) -> None:
    """Put an image into assets/demo, in as few colours as show it well."""
    target = Path("assets/demo") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(image).convert("RGB").quantize(128).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path("runs/demo"), help="demo's run")
    parser.add_argument(
        "--responses", type=Path, default=Path("runs/demo_vlm"), help="demo --vlm's"
    )
    runs = parser.parse_args()
    for page in map(Path, PAGES):
        fill(page, "demo figures", images_table(runs.images))
    fill(Path("README.md"), "demo responses", responses_table(runs.responses))
    keep(runs.images / "evaluation/comparison.png", "grid.png")
    keep(runs.responses / "evaluation/descriptions.png", "descriptions.png")
    print(f"Wrote {', '.join(PAGES)} and assets/demo")


if __name__ == "__main__":
    main()
