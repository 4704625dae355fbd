"""Held-out accuracy of Diffusion-DPO on the playground, at several learning rates.

    .venv/bin/python scripts/holdout_playground.py              # some 20 minutes on two cores
    .venv/bin/python scripts/holdout_playground.py --steps 4 --limit 60 --out /tmp/held_out

Each run is configs/playground/diffusion_dpo.yaml with a share of its prompts held out. What is
printed and plotted is the implicit accuracy on the pairs that are trained on, a mean over each
interval, next to that on the held-out pairs, with the 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from diffalign import config
from diffalign.files import read_json_lines, write_image
from diffalign.imaging.grid import INK, LINE, MUTED, PAPER, font_for
from diffalign.jobs import train
from diffalign.training.config import RunConfig

CONFIG = Path("configs/playground/diffusion_dpo.yaml")
COLOURS = ((36, 104, 180), (196, 96, 32), (22, 128, 92), (140, 60, 150))
WIDTH, HEIGHT, MARGIN, GAP = 620, 360, 56, 24

Row = Mapping[str, float]


def main() -> None:
    """Train, print the table, plot the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-5, 3e-4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=0, help="steps of an interval; 0: a tenth")
    parser.add_argument("--holdout", type=float, default=0.25)
    parser.add_argument("--limit", type=int, default=600, help="pairs of the data set")
    parser.add_argument("--samples", type=int, default=16, help="pairs a step")
    parser.add_argument("--out", type=Path, default=Path("runs/holdout"))
    given = parser.parse_args()
    runs = {f"lr {lr:g}": trained(given, lr) for lr in given.lr}
    print(table(runs))
    figure = given.out / "holdout.png"
    write_image(figure, plotted(runs))
    print(f"figure: {figure}")


def trained(given: argparse.Namespace, lr: float) -> list[Row]:
    """The rows of a run's metrics; it is taken as it is where it has ended already."""
    output = given.out / f"lr-{lr:g}"
    every = given.every or max(1, given.steps // 10)
    if not (output / "final").is_dir():
        settings = {
            "output": output,
            "optimizer.lr": lr,
            "optimizer.warmup_steps": min(20, given.steps // 4),
            "optimizer.schedule": "constant",
            "training.optimizer_steps": given.steps,
            "training.samples_per_device": given.samples,
            "training.log_every": every,
            "data.holdout": given.holdout,
            "data.limit": given.limit,
            "evaluation.every": every,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        train.run(config.load(RunConfig, CONFIG, overrides))
    return read_json_lines(output / "metrics.jsonl")


def table(runs: Mapping[str, Sequence[Row]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | step | training accuracy | held-out accuracy (95 %) | held-out loss |",
        "|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        for row in rows:
            trained = f"{row['accuracy']:.0%}" if "accuracy" in row else ""
            low, high = (
                row.get(f"held_out/accuracy_{end}", float("nan")) for end in ("low", "high")
            )
            lines.append(
                f"| {name} | {row['step']} | {trained} | {row['held_out/accuracy']:.0%} "
                f"({low:.0%} to {high:.0%}) | {row['held_out/loss']:.3f} |"
            )
    return "\n".join(lines)


def plotted(runs: Mapping[str, Sequence[Row]]) -> Image.Image:
    """One panel a run: accuracy over steps, training broken, held out whole with its interval."""
    canvas = Image.new("RGB", (len(runs) * (WIDTH + GAP), HEIGHT + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for place, ((name, rows), colour) in enumerate(zip(runs.items(), COLOURS, strict=False)):
        _panel(pen, name, rows, colour, left=place * (WIDTH + GAP) + MARGIN)
    return canvas


def _panel(
    pen: ImageDraw.ImageDraw, name: str, rows: Sequence[Row], colour: tuple[int, ...], *, left: int
) -> None:
    font, right, last = font_for(name, 20), left + WIDTH - MARGIN, rows[-1]["step"]

    def at(step: float, share: float) -> tuple[float, float]:
        return left + step / last * (right - left), MARGIN + (1 - share) / 0.7 * HEIGHT

    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        y = at(0, share)[1]
        pen.line((left, y, right, y), fill=LINE, width=2 if share == 0.5 else 1)
        pen.text((left - 8, y), f"{share:.0%}", fill=MUTED, font=font_for("", 16), anchor="rm")
    bands = [row for row in rows if "held_out/accuracy_low" in row]
    upper = [at(row["step"], row["held_out/accuracy_high"]) for row in bands]
    lower = [at(row["step"], row["held_out/accuracy_low"]) for row in bands]
    if len(bands) > 1:
        pen.polygon([*upper, *reversed(lower)], fill=(*colour, 45))
    pen.line([at(row["step"], row["held_out/accuracy"]) for row in rows], fill=colour, width=4)
    training = [at(row["step"], row["accuracy"]) for row in rows if "accuracy" in row]
    pen.line(training, fill=INK, width=3)
    for x, y in training:
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=INK)
    pen.text((left, MARGIN / 3), f"{name}: ", fill=INK, font=font)
    pen.text((left + 130, MARGIN / 3), "training", fill=INK, font=font)
    pen.text((left + 230, MARGIN / 3), "held out, 95 % interval", fill=colour, font=font)
    pen.text((right, HEIGHT + MARGIN + 12), f"step {last:g}", fill=MUTED, font=font, anchor="ra")


if __name__ == "__main__":
    main()
