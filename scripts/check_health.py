"""Verdicts of `training.health` on runs of the playground that are known to be harmful or sound.

    python scripts/check_health.py                     # all: some 40 minutes on two cores
    python scripts/check_health.py bad_rate demo       # some of them

A harmful run is trained for half of its steps at most and has to be named by its verdict before; a
sound one is trained to its end and must get none. With `--series FILE` the figures on which
verdicts rest are written there, which is how tests/training/health_series.jsonl was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import config
from diffalign.files import read_json_lines, write_json_lines
from diffalign.jobs import precompute, train
from diffalign.training.checkpoint import checkpoints_in
from diffalign.training.config import RunConfig
from diffalign.training.health_record import Record
from diffalign.training.hooks.health import HEALTH
from diffalign.training.verdicts import error_growth

PLAYGROUND = Path("configs/playground")


@dataclass(frozen=True)
class Case:
    """A run whose state of health is known."""

    file: str
    """Config below configs/playground."""
    settings: Sequence[str] = ()
    verdict: str | None = None
    """That it has to get; None where it must get none."""


HELD_OUT = (
    "data.limit=260",
    "data.holdout=0.3",
    "optimizer.schedule=constant",
    "training.optimizer_steps=240",
    "evaluation.every=10",
)
"""Of `scripts/holdout_playground.py`, as docs/log.md has it."""
CASES = {
    "bad_rate": Case("diffusion_dpo", (*HELD_OUT, "optimizer.lr=3e-4"), "rate_too_high"),
    "bad_d3po": Case(
        "d3po",
        (
            "rollouts.reference=initial",
            "rollouts.prompts_per_round=96",
            "rollouts.prompts_per_batch=16",
            "rollouts.images_per_prompt=4",
            "rollouts.pairs=all",
            "rollouts.trained_steps=null",
            "likelihood.process={steps: 10, guidance: 2.0}",
            "optimizer.lr=5e-5",
            "optimizer.schedule=constant",
            "training.optimizer_steps=240",
            "training.accumulation=2",
            "training.log_every=10",
        ),
        "beyond_clip",
    ),
    "hacked_jpeg": Case(
        "d3po_jpeg",
        ("rollouts.watch=[{kind: diffalign.playground.oracle}]",),
        "reward_hacked",
    ),
    "bad_beta": Case("responses/dpo", ("objective.beta=0.1",), "chosen_falls"),
    "bad_rate_vlm": Case("responses/dpo", ("optimizer.lr=5e-3",), "displaced"),
    "simpo": Case("responses/simpo", verdict="chosen_falls"),  # 12.7 points of recall: results.md
    "demo": Case("diffusion_dpo"),
    "demo_vlm": Case("responses/mdpo"),
    "mapo": Case("mapo"),
    "d3po": Case("d3po", ("rollouts.watch=[{kind: jpeg}, {kind: jpeg, goal: incompressible}]",)),
    "d3po_jpeg": Case("d3po_jpeg"),
    "seppo": Case("seppo"),
    "diffusion_dpo_cached": Case("diffusion_dpo_cached"),
    **{
        name: Case(f"responses/{name}")
        for name in (
            "chip",
            "dpo",
            "ipo",
            "kto",
            "mask_dpo",
            "opa_dpo_stage1",
            "povid",
            "re_align",
            "rlhf_v",
            "v_dpo",
        )
    },
    "opa_dpo": Case("responses/opa_dpo", ("model.lora.start=OUT/opa_dpo_stage1",)),
}
"""Left out: spm, spo and d3po_feedback, which need what other commands make first."""
FIGURES = (
    "step",
    "samples",
    "loss",
    "accuracy",
    "accuracy/chosen_shorter",
    "accuracy/chosen_longer",
    "chosen_longer",
    "saturated",
    "far_off",
    "clipped",
    "abs_log_ratio",
    "cosine_of_sides",
    "error/chosen",
    "error/rejected",
    "drift/chosen",
    "drift/rejected",
    "log_prob/chosen",
    "log_prob/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "displaced",
    "fell/chosen",
    "top_entropy",
    "top_mass",
    "held_out/loss",
    "held_out/accuracy",
)
OF_TERMS = ("far_off", "saturated", "clipped", "abs_log_ratio")
"""Figures of a row, and of each term, that a series keeps, with those of rounds."""


def main() -> None:
    """Train, print a line a run, write the series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/health"))
    parser.add_argument("--series", type=Path, help="JSON lines: the figures of a run each")
    parser.add_argument("--steps", type=int, help="optimiser steps in place of each run's own")
    given = parser.parse_args()
    names = given.names or list(CASES)
    if unknown := sorted({*names} - CASES.keys()):
        parser.error(f"{unknown[0]} is none of {', '.join(CASES)}")
    runs = {name: _run(name, given.out, given.steps) for name in names}
    rows = {name: _rows(name, run) for name, run in runs.items()}
    wrong = [name for name, run in runs.items() if not _is_right(name, run)]
    if given.series is not None:
        write_json_lines(given.series, [_series(runs[name], name, rows[name]) for name in names])
    print(table({name: _extremes(runs[name], rows[name]) for name in names}))
    print(f"{len(names) - len(wrong)} of {len(names)} as they should be")
    if wrong and given.steps is None:
        raise SystemExit(f"not as it should be: {', '.join(wrong)}")


def _run(name: str, out: Path, steps: int | None) -> RunConfig:
    case, output = CASES[name], out / name
    settings = [setting.replace("OUT", str(out)) for setting in case.settings]
    settings += [f"output={output}", f"encodings_cache={out / 'encodings'}"]
    if case.verdict is not None:
        settings += ["training.health=stop"]
    if steps is not None:
        settings += [f"training.optimizer_steps={steps}", "optimizer.warmup_steps=0"]
    return config.load(RunConfig, PLAYGROUND / f"{case.file}.yaml", settings)


def _rows(name: str, run: RunConfig) -> list[Mapping[str, Any]]:
    """The rows of a run; it is taken as it is where it has ended already."""
    if not checkpoints_in(run.output):
        if run.model.takes_encodings:
            precompute.run(run, named=[str(PLAYGROUND / f"{CASES[name].file}.yaml")])
        train.run(run)
    return read_json_lines(run.output / "metrics.jsonl")


def _is_right(name: str, run: RunConfig) -> bool:
    """Print what a run was told, and say whether that is right."""
    file = run.output / HEALTH
    told = read_json_lines(file) if file.is_file() else []
    wanted, half = CASES[name].verdict, run.training.optimizer_steps / 2
    said = ", ".join(f"{row['verdict']} at step {row['step']}" for row in told) or "nothing"
    print(f"{name}: {said} (wanted: {wanted or 'nothing'}{f' before {half:g}' if wanted else ''})")
    if wanted is None:
        return not told
    return any(row["verdict"] == wanted and row["step"] < half for row in told)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The largest figures of each run, as Markdown; what a run does not have is left empty."""
    heads = ("chosen error", "far off", "fall of chosen", "clip ranges", "displaced", "entropy")
    forms = ("{:.2f}", "{:.1%}", "{:.3f}", "{:.1f}", "{:.2f}", "{:.1f}")
    lines = [f"| run | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, of in found.items():
        cells = [
            form.format(of[head]) if head in of else ""
            for head, form in zip(heads, forms, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _extremes(run: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest value of each figure that rules read, over the windows that they see; of the
    entropy, over that of the first window, the last one."""
    record = Record(measure=run.likelihood.measures, clip=getattr(run.objective, "clip", None))
    largest: dict[str, float] = {}
    for row in rows:
        record = record.after(row)
        if "loss" not in row or not record.is_enough:
            continue
        gain, best = record.gain("chosen"), record.best.get("chosen")
        entropy, first = record.recent("top_entropy"), record.first.get("top_entropy")
        found = {
            "chosen error": error_growth(record),
            "far off": max((value for _, value in record.terms("far_off")), default=None),
            "fall of chosen": None if gain is None or best is None else best - gain,
            "clip ranges": None
            if record.clip is None
            else min(each["abs_log_ratio"] for each in record.latest) / record.clip,
            "displaced": record.recent("displaced"),
            "entropy": entropy / first if entropy is not None and first else None,
        }
        for head, value in found.items():
            if value is not None:
                before = value if head == "entropy" else largest.get(head, value)
                largest[head] = max(value, before)
    return largest


def _series(run: RunConfig, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run by name, to four digits; null where a row lacks one."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if _is_read(n)]
    return {
        "name": name,
        "verdict": CASES[name].verdict,
        "measure": run.likelihood.measures,
        "clip": getattr(run.objective, "clip", None),
        "optimizer_steps": run.training.optimizer_steps,
        "figures": {n: [_short(row.get(n)) for row in rows] for n in names},
    }


def _is_read(name: str) -> bool:
    last = name.rpartition("/")[2]
    if name.startswith("round/"):
        return last.endswith(("_mean", "_std", "scored", "images", "tied_share"))
    return name in FIGURES or last in OF_TERMS


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    main()
