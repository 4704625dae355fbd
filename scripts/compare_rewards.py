"""Reward models of one's own on the playground: what they learn, and whose taste they know.

    python scripts/compare_rewards.py                        # some 10 minutes of one core
    python scripts/compare_rewards.py --only pal pal_none    # some; others stay as they are
    python scripts/compare_rewards.py --trial                # does it run? changes no page

The shipped pairs are learnt by a tiny LLaVA whose candidates are images, and by heads on the frozen
features of a tiny CLIP, which has seen these pairs when it was made; a fifth of the prompts is held
out. Shipped pairs of responses are learnt by the same LLaVA; a fifth of the images is held out.
Then two simulated annotators of opposite taste label other pairs: of two images of the same shapes
one prefers the redder, the other the bluer. PAL is told who labelled what, Bradley-Terry is not;
accuracy is on pairs of prompts that nobody labelled. The table goes into docs/results.md.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.state import AcceleratorState, PartialState
from pages import fill, filled, merged
from PIL import Image

from diffalign import config
from diffalign.calibration import agreement
from diffalign.jobs import train
from diffalign.playground.scenes import COLOURS, PALETTE, SHAPES, Kind, place, render
from diffalign.scorers.trained import Trained
from diffalign.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results.md"
CONFIGS = ROOT / "configs/playground"
ANNOTATORS = {"warm": 1.0, "cold": -1.0}
"""Annotator -> the sign of redness in what they prefer."""
TRAINED_ON, MEASURED_ON = 480, 240
"""Pairs of coloured shapes that each annotator labels."""
HEAD = (
    "| model | trained on | held-out accuracy | 95 % interval | ECE |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """One reward model."""

    name: str
    title: str
    config: str
    data: str
    """What it learns, in words."""
    more: tuple[str, ...] = ()
    tastes: bool = False
    """Whether it learns the two annotators."""
    section: str = "data"
    """Of the config that names the pairs."""


def taste(name: str, title: str, head: str, *more: str) -> Row:
    return Row(
        name,
        title,
        "reward_clip",
        "two opposite tastes",
        (f"model.head={head}", "data.holdout=null", "data.path={tastes}/train", *more),
        tastes=True,
    )


ROWS = (
    Row("vlm", "tiny LLaVA, images as candidates", "reward_vlm", "shipped pairs"),
    Row("clip", "tiny CLIP, a head with 64 units", "reward_clip", "shipped pairs"),
    Row(
        "general",
        "tiny CLIP, general preference embeddings",
        "reward_clip",
        "shipped pairs",
        ("model.head={kind: general, blocks: 2, hidden: 64}",),
    ),
    Row(
        "responses",
        "tiny LLaVA, responses as candidates",
        "responses/reward",
        "shipped responses",
        section="responses",
    ),
    taste(
        "pal",
        "tiny CLIP, PAL of two prototypes",
        "{kind: pal, users: [warm, cold], prototypes: 2}",
        "data.users=user_id",
        "optimizer.lr=3e-3",
        "training.optimizer_steps=300",
        "training.samples_per_device=16",
    ),
    taste("pal_none", "tiny CLIP, one Bradley-Terry head", "{kind: linear, hidden: 64}"),
)


def main() -> None:
    args = parse_arguments()
    folder: Path = args.folder
    tastes = folder / "tastes"
    if not (tastes / "test/train.parquet").is_file():
        few = 8 if args.trial else None
        write_tastes(tastes / "train", few or TRAINED_ON, seed=1, prompts=range(0, 20, 2))
        write_tastes(tastes / "test", few or MEASURED_ON, seed=2, prompts=range(1, 20, 2))
    lines = {}
    for row in ROWS:
        if args.only and row.name not in args.only:
            continue
        run = folder / row.name
        if not (run / "final").is_dir():
            fit(row, run, tastes, trial=args.trial)
        for title, figures in measured(row, run, tastes).items():
            lines[title] = line(title, row.data, figures)
            print(lines[title], flush=True)
    if args.trial:
        return
    order = [title for row in ROWS for title in titles(row)]
    fill(PAGE, "rewards", merged(filled(PAGE, "rewards"), HEAD, lines, order) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/compare_rewards")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], default=[])
    parser.add_argument("--trial", action="store_true", help="two steps, and no page")
    return parser.parse_args()


def write_tastes(folder: Path, pairs: int, *, seed: int, prompts: range) -> None:
    """Pairs of images that each annotator labels, as Pick-a-Pic parquet.

    Args:
        folder: gets `train.parquet`.
        pairs: of each annotator, all of other images.
        seed: of the images.
        prompts: which of the 20 combinations of one or two shapes.
    """
    shapes = [(one,) for one in SHAPES] + list(product(SHAPES, SHAPES))
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(pairs):
        for annotator, sign in ANNOTATORS.items():
            wanted = shapes[prompts[number % len(prompts)]]
            shown = [[Kind(str(random.choice(COLOURS)), s) for s in wanted] for _ in range(2)]
            first, second = (sign * redness(kinds) for kinds in shown)
            label = 0.5 + 0.5 * float(np.sign(round(first - second, 6)))
            rows.append(
                {
                    "caption": " and ".join(f"a {shape}" for shape in wanted),
                    "jpg_0": encoded(render(place(shown[0], random))),
                    "jpg_1": encoded(render(place(shown[1], random))),
                    "label_0": label,
                    "label_1": 1 - label,
                    "user_id": annotator,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def redness(kinds: list[Kind]) -> float:
    """Mean of red less blue over the objects, in [-1, 1]."""
    return float(
        np.mean([PALETTE[kind.colour][0] - PALETTE[kind.colour][2] for kind in kinds]) / 255
    )


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def fit(row: Row, run: Path, tastes: Path, *, trial: bool) -> None:
    few = (
        "training.optimizer_steps=2",
        "optimizer.warmup_steps=0",
        "training.samples_per_device=4",
    )
    settings = [
        f"output={run}",
        f"{row.section}.holdout=0.2",
        *(setting.replace("{tastes}", str(tastes)) for setting in row.more),
        *(few if trial else ()),
    ]
    train.run(config.load(RunConfig, CONFIGS / f"{row.config}.yaml", settings))
    for state in (AcceleratorState, PartialState):  # the next run has another precision or folder
        state._reset_state()


def titles(row: Row) -> list[str]:
    """The lines of the table that a model has."""
    return [f"{row.title}: {name}" for name in ANNOTATORS] if row.tastes else [row.title]


def measured(row: Row, run: Path, tastes: Path) -> dict[str, dict[str, float]]:
    """Accuracy, interval and calibration error, by line of the table."""
    if not row.tastes:
        rows = [json.loads(each) for each in (run / "metrics.jsonl").read_text().splitlines()]
        last = [each for each in rows if "held_out/accuracy" in each][-1]
        return {row.title: {name: last.get(f"held_out/{name}", np.nan) for name in FIGURES}}
    table = pq.read_table(tastes / "test/train.parquet").to_pylist()
    found = {}
    for name, title in zip(ANNOTATORS, titles(row), strict=True):
        own = [each for each in table if each["user_id"] == name]
        scorer = Trained(path=str(run), user=name if row.name == "pal" else None)
        gaps = gaps_of(scorer, own)
        said = agreement(gaps, [each["label_0"] for each in own], [each["caption"] for each in own])
        assert said is not None, "some pairs are decided"
        found[title] = {n: x for n, x in said.to_dict().items() if n in FIGURES}
    return found


FIGURES = ("accuracy", "accuracy_low", "accuracy_high", "ece")


def gaps_of(scorer: Trained, rows: list[dict[str, Any]]) -> list[float]:
    """Score of the first image less that of the second."""
    prompts = [row["caption"] for row in rows]
    sides = [
        scorer.score_images(
            [Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB") for row in rows], prompts
        )
        for side in (0, 1)
    ]
    return [float(gap) for gap in sides[0] - sides[1]]


def line(title: str, data: str, figures: dict[str, float]) -> str:
    accuracy, low, high = (100 * figures[name] for name in FIGURES[:3])
    return (
        f"| {title} | {data} | {accuracy:.1f} % | {low:.1f} to {high:.1f} | {figures['ece']:.3f} |"
    )


if __name__ == "__main__":
    main()
