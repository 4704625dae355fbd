"""Every method on the playground: same base, same held-out prompts, one table in docs/results.md.

    .venv/bin/python scripts/compare_methods.py                    # all, two side by side
    .venv/bin/python scripts/compare_methods.py --only mapo spo    # some; others stay as they are
    .venv/bin/python scripts/compare_methods.py --only mapo --trial  # does it run? changes no page

Each row is a config under configs/playground, trained by `diffalign train` on one thread; what it
needs first (a preference model, an annotator's file) is made by the commands of `preparations`. A
run that is there already is taken as it is: delete its folder to do it again. At the end all models
sample the held-out prompts from the same noise, the oracle reads the images, and what is
between the two markers of docs/results.md is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from pages import fill, filled, merged

from diffalign.comparison.diversity import diversity, pixel_distance
from diffalign.comparison.report import percent, percent_interval
from diffalign.comparison.results import Result
from diffalign.generation.manifest import read_manifest
from diffalign.generation.prompts import PromptsConfig
from diffalign.generation.text_to_image import SamplerConfig
from diffalign.jobs import compare, generate, score
from diffalign.playground.models import playground_model_path
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.playground.scenes import held_out_prompts
from diffalign.scorers.base import AbstractScorer

PAGE = Path("docs/results.md")
CONFIGS = Path("configs/playground")
SEEDS = 9
SAMPLER = SamplerConfig(steps=12, guidance=2.0)
TRIAL = (
    "optimizer.warmup_steps=0",
    "training.optimizer_steps=2",
    "training.samples_per_device=2",
    "training.log_every=1",
)
"""What makes a run short enough to see whether it runs."""


@dataclass(frozen=True)
class Row:
    """One trained model of the table."""

    name: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    preparation: str | None = None


ROWS = (
    Row("dpo", "Diffusion-DPO", "diffusion_dpo.yaml"),
    Row("mapo", "MaPO", "mapo.yaml"),
    Row("d3po", "D3PO, the oracle scores", "d3po.yaml"),
    Row("d3po_feedback", "D3PO, a simulated annotator", "d3po_feedback.yaml", (), "feedback"),
    Row("spo", "SPO, its SPM trained here", "spo.yaml", (), "spm"),
    Row("seppo", "SePPO, winners alone", "seppo.yaml"),
    Row(
        "spo_best",
        "SPO going on from the best candidate",
        "spo.yaml",
        ("rollouts.continue_from=best",),
        "spm",
    ),
    Row(
        "spo_plain",
        "SPO with the plain scorer",
        "spo.yaml",
        ("rollouts.scorer={kind: pickscore, path: assets/playground/clip}",),
    ),
    Row("seppo_no_anchor", "SePPO without its anchor", "seppo.yaml", ("objective.anchor=none",)),
    Row("seppo_initial", "SePPO, initial reference", "seppo.yaml", ("rollouts.reference=initial",)),
    Row("seppo_latest", "SePPO, latest reference", "seppo.yaml", ("rollouts.reference=latest",)),
)


def preparations(folder: Path) -> dict[str, list[list[str]]]:
    """Commands by name, each list in order; run once for all rows that name it."""
    groups, pairs = folder / "groups", folder / "pairs"
    return {
        "spm": [
            [
                *("scripts/make_playground_preferences.py", "--out", str(pairs)),
                *("--images", "40", "--seed", "5000000"),
            ],
            [
                *("-m", "diffalign", "train", str(CONFIGS / "spm.yaml")),
                *(f"data.path={pairs}", f"output={folder / 'spm'}"),
            ],
        ],
        "feedback": [
            [
                *("-m", "diffalign", "generate", f"models.base={playground_model_path()}"),
                *("prompts=assets/playground/prompts.txt", "batch_size=56", f"output={groups}"),
                *("trajectories.process.steps=10", "trajectories.process.guidance=2"),
            ],
            ["scripts/annotate_playground.py", str(groups)],
        ],
    }


def made_by(folder: Path) -> dict[str, tuple[str, ...]]:
    """Overrides that point a row at what its preparation made."""
    groups = folder / "groups"
    return {
        "spm": (f"rollouts.scorer.path={folder / 'spm/final'}",),
        "feedback": (
            f"rollouts.trajectories={groups}",
            f"rollouts.preferences={groups / 'preferences.jsonl'}",
        ),
    }


def call(arguments: Sequence[str], log: Path) -> float:
    """Run Python on one thread.

    Returns:
        The seconds of processor time that it and its children took: what it takes on a core of its
        own, whatever else the machine is doing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed; see {log}")
    return used.ru_utime + used.ru_stime


def prepare(folder: Path, name: str) -> None:
    """Make what some rows need, unless it is there."""
    record = folder / f"{name}.json"
    if not record.exists():
        commands = preparations(folder)[name]
        seconds = sum(call(command, folder / f"{name}.log") for command in commands)
        record.write_text(json.dumps({"seconds": seconds}))


def train(folder: Path, row: Row, more: Sequence[str]) -> None:
    """Train one row, unless it is there."""
    run = folder / row.name
    if (run / "seconds.json").exists():
        return
    given = made_by(folder)[row.preparation] if row.preparation else ()
    if run.exists():
        raise SystemExit(f"{run} is unfinished, and half a run has no cost: delete it first")
    command = ["-m", "diffalign", "train", str(CONFIGS / row.config), f"output={run}"]
    seconds = call([*command, *given, *row.overrides, *more], folder / f"{row.name}.log")
    (run / "seconds.json").write_text(json.dumps(seconds))
    print(f"{row.title}: {seconds:.0f} s", flush=True)


def evaluate(
    runs: Path,
    images: Path,
    rows: Sequence[Row],
    prompts: Sequence[str],
    *,
    base: Path | None = None,
    scorer: AbstractScorer | None = None,
) -> list[Result]:
    """Generate with, score and compare all rows with the base.

    Args:
        base: its folder; None is the playground's.
        scorer: None is the oracle.
    """
    generate.run(
        generate.GenerateConfig(
            models={
                "base": str(base or playground_model_path()),
                **{row.name: str(runs / row.name) for row in rows},
            },
            prompts=PromptsConfig(texts=tuple(prompts)),
            seeds=SEEDS,
            sampler=SAMPLER,
            batch_size=36,
            output=images,
        )
    )
    scorer = scorer or PlaygroundOracle()
    score.run(score.ScoreConfig(images=images, scorer=scorer, batch_size=256))
    models = tuple(row.name for row in rows)
    return compare.run(compare.CompareConfig(images=images, baseline="base", models=models))


def costs(run: Path) -> tuple[int, int, float]:
    """Network evaluations (rows), images scored, CPU seconds of a run."""
    timing = (run / "timing.jsonl").read_text().splitlines()
    records = [json.loads(path.read_text()) for path in run.glob("rounds/*/round.json")]
    scored = sum(record["harvest"]["summary"].get("scored", 0) for record in records)
    seconds = json.loads((run / "seconds.json").read_text())
    return json.loads(timing[-1])["network_rows"], int(scored), seconds


def table(folder: Path, rows: Sequence[Row], results: Sequence[Result], before: str) -> str:
    """The results as Markdown; rows that are not there are those of the table before."""
    spread = diversity(folder / "evaluation", read_manifest(folder / "evaluation"), pixel_distance)
    base = results[0].comparison
    head = [
        "| method | win rate of decided pairs (95 % interval) | wins / ties / losses "
        "| fidelity (gain, 95 % interval) | pixel distance | UNet rows | images scored "
        "| CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = {"base": f"| base | | | {percent(base.baseline_mean)} | {spread['base']:.3f} | | | |"}
    for row, result in zip(rows, results, strict=True):
        c = result.comparison
        evaluations, scored, seconds = costs(folder / row.name)
        lines[row.title] = (
            f"| {row.title} | {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {c.wins} / {c.ties} / {c.losses} "
            f"| {percent(c.model_mean)} ({percent(c.mean_difference)}, "
            f"{percent_interval(c.mean_difference_interval)}) | {spread[row.name]:.3f} "
            f"| {evaluations:,} | {scored:,} | {seconds:.0f} |"
        )
    prepared = dict(re.findall(r"(\w+) (\d+) s\b", before.partition("Prepared once:")[2]))
    for name in {row.preparation for row in rows if row.preparation}:
        seconds = json.loads((folder / f"{name}.json").read_text())["seconds"]
        prepared[name] = f"{seconds:.0f}"
    first = "; ".join(f"{name} {seconds} s" for name, seconds in sorted(prepared.items())) or "none"
    return (
        merged(before, head, lines, ["base", *(row.title for row in ROWS)])
        + f"\n\n{base.items} images of {base.prompts} held-out prompts, {SEEDS} seeds, "
        f"{SAMPLER.steps} steps, guidance {SAMPLER.guidance:g}. Pixel distance: root mean square "
        f"difference of a prompt's images, for which a shifted copy is another image. CPU seconds: "
        f"of the whole run, one thread. "
        f"Prepared once: {first}. {os.cpu_count()} cores ({platform.machine()}, "
        f"torch {torch.__version__}), by "
        f"`python scripts/compare_methods.py`.\n"
    )


def trial_page(folder: Path) -> Path:
    """A copy of the page that a trial may fill."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(PAGE, folder / PAGE.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", nargs="+", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--trial", action="store_true", help="two steps, two prompts; a copy of the page is filled"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    page, more = (trial_page(folder), TRIAL) if arguments.trial else (PAGE, ())
    wanted = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    with ThreadPoolExecutor(arguments.side_by_side) as pool:
        needed = sorted({row.preparation for row in wanted if row.preparation})
        list(pool.map(lambda name: prepare(folder, name), needed))
        list(pool.map(lambda row: train(folder, row, more), wanted))
    trained = [row for row in ROWS if (folder / row.name / "seconds.json").exists()]
    prompts = held_out_prompts()[: 2 if arguments.trial else None]
    results = evaluate(folder, folder / "evaluation", trained, prompts)
    figures = table(folder, trained, results, filled(page, "methods"))
    fill(page, "methods", figures)
    print(figures)


if __name__ == "__main__":
    main()
