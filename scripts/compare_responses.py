"""Every method for responses on the playground: same base, same scenes, one table in
docs/results.md.

    .venv/bin/python scripts/compare_responses.py                  # all, two side by side
    .venv/bin/python scripts/compare_responses.py --only dpo mdpo  # some; others stay as they are
    .venv/bin/python scripts/compare_responses.py --only dpo --trial  # does it run? changes no page

Each row is a config under configs/playground/responses, trained by `diffalign train` on one thread.
A run that is there already is taken as it is: delete its folder to do it again. Each model then
responses questions about held-out scenes, greedily, and what it says is held against the truth.
What is between the two markers of docs/results.md is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from compare_methods import PAGE, TRIAL, call, trial_page
from pages import figure, fill, filled, merged

from diffalign import config
from diffalign.benchmarks.report import Figure
from diffalign.jobs.demo_responses import answerer
from diffalign.models.vlm.config import VLM
from diffalign.playground.models import playground_responses_path
from diffalign.playground.response_quality import evaluate_responses, held_out_multi_object_scenes
from diffalign.training.config import RunConfig

CONFIGS = Path("configs/playground/responses")
COLUMNS = {
    "chair_s": "CHAIR-s",
    "chair_i": "CHAIR-i",
    "recall": "recall",
    "repetition_s": "named twice",
    "pope_accuracy": "POPE accuracy",
    "pope_yes_ratio": "yes",
    "mean_length": "words",
}
SCENES = 300


@dataclass(frozen=True)
class Row:
    """One trained model of the table."""

    name: str
    title: str
    config: str
    after: str | None = None
    """Name of the row whose adapter this one starts from."""
    shuffled: bool = False
    """Train next to the images of other rows: what is learnt then needs no image."""
    ranking: str = ""
    """Settings of `responses.ranking`, whose numbers are computed under the base first."""


ROWS = (
    Row("dpo", "DPO", "dpo.yaml"),
    Row("mdpo", "mDPO", "mdpo.yaml"),
    Row("mdpo_repeats", "mDPO, repeats rejected too", "mdpo_repeats.yaml"),
    Row("re_align", "Re-Align", "re_align.yaml"),
    Row("opa_dpo_stage1", "OPA-DPO, first stage", "opa_dpo_stage1.yaml"),
    Row("opa_dpo", "OPA-DPO, both stages", "opa_dpo.yaml", after="opa_dpo_stage1"),
    Row("v_dpo", "V-DPO", "v_dpo.yaml"),
    Row("chip", "CHiP", "chip.yaml"),
    Row("povid", "POVID", "povid.yaml"),
    Row("mask_dpo", "Mask-DPO", "mask_dpo.yaml"),
    Row("rlhf_v", "RLHF-V", "rlhf_v.yaml"),
    Row("simpo", "SimPO", "simpo.yaml"),
    Row("kto", "KTO", "kto.yaml"),
    Row("ipo", "IPO", "ipo.yaml"),
    Row(
        "dpo_ches",
        "DPO, the half of the pairs with the lowest CHES",
        "dpo.yaml",
        ranking="by: ches_normalised, keep: 0.5",
    ),
    Row(
        "dpo_ches_highest",
        "DPO, the half with the highest",
        "dpo.yaml",
        ranking="by: ches_normalised, keep: 0.5, first: highest",
    ),
    Row(
        "dpo_easy_to_hard",
        "DPO, from easy to hard pairs in four bands",
        "dpo.yaml",
        ranking="by: difficulty, bands: 4, passes: 3",
    ),
    Row("dpo_shuffled", "DPO next to other images", "dpo.yaml", shuffled=True),
    Row("mdpo_shuffled", "mDPO next to other images", "mdpo.yaml", shuffled=True),
)


def shuffle_images(folder: Path) -> None:
    """The preferences again, every row next to the image of another one."""
    source = pq.read_table(sorted(playground_responses_path().glob("*.parquet")))
    target = folder / "shuffled/train.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    others = np.roll(np.random.default_rng(0).permutation(source.num_rows), 1)
    order = np.empty_like(others)
    order[np.roll(others, -1)] = others
    column = source.schema.get_field_index("image")
    pq.write_table(
        source.set_column(column, source.schema.field(column), source["image"].take(order)), target
    )


def rank_pairs(folder: Path, rows: Sequence[Row]) -> None:
    """Numbers of the pairs under the base, where a row needs them and they are not there."""
    numbers = folder / "numbers.parquet"
    if numbers.exists() or not any(row.ranking for row in rows):
        return
    command = ["-m", "diffalign", "precompute", str(CONFIGS / "dpo.yaml"), "--scores", str(numbers)]
    call([*command, f"output={folder / 'numbers'}"], folder / "numbers.log")


def train(folder: Path, row: Row, more: Sequence[str]) -> None:
    """Train one row, unless it is there."""
    run = folder / row.name
    if (run / "seconds.json").exists():
        return
    if run.exists():
        raise SystemExit(f"{run} is unfinished, and half a run has no cost: delete it first")
    command = ["-m", "diffalign", "train", str(CONFIGS / row.config), f"output={run}"]
    if row.shuffled:
        command.append(f"responses.path={folder / 'shuffled'}")
    if row.ranking:
        ranking = f"{{{row.ranking}, file: {folder / 'numbers.parquet'}}}"
        command.append(f"responses.ranking={ranking}")
    if row.after:
        command.append(f"model.lora.start={folder / row.after}")
    seconds = call([*command, *more], folder / f"{row.name}.log")
    (run / "seconds.json").write_text(json.dumps(seconds))
    print(f"{row.title}: {seconds:.0f} s", flush=True)


def measure(folder: Path, run: Path | None, scenes: int) -> dict[str, Figure]:
    """What a trained model, or the base, says of held-out scenes; kept next to the run."""
    record = (run or folder / "base") / "responses.json"
    if not record.exists():
        saved = config.load(RunConfig, CONFIGS / "dpo.yaml" if run is None else run / "config.yaml")
        assert isinstance(saved.model, VLM), "the configs train responses"
        model = answerer(saved.model, run)
        figures = evaluate_responses(model, held_out_multi_object_scenes(scenes))
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({name: asdict(f) for name, f in figures.items()}))
    return {name: figure(saved) for name, saved in json.loads(record.read_text()).items()}


def table(folder: Path, rows: Sequence[Row], scenes: int, before: str) -> str:
    """The results as Markdown; rows that are not there are those of the table before."""
    head = [
        f"| method | {' | '.join(COLUMNS.values())} | CPU seconds |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    lines = {"base": f"| base | {_cells(measure(folder, None, scenes))} | |"}
    for row in rows:
        run = folder / row.name
        seconds = json.loads((run / "seconds.json").read_text())
        cells = _cells(measure(folder, run, scenes))
        lines[row.title] = f"| {row.title} | {cells} | {seconds:.0f} |"
    return (
        merged(before, head, lines, ["base", *(row.title for row in ROWS)])
        + f"\n\n{scenes} held-out scenes; 95 % intervals, resampled by scene; percent, and words "
        f"of a description. Named twice: descriptions that name an object again; empty where a row "
        f"was measured before that was counted. CPU seconds: of the whole run, one thread. "
        f"{os.cpu_count()} cores ({platform.machine()}, torch {torch.__version__}), by "
        f"`python scripts/compare_responses.py`.\n"
    )


def _cells(figures: Mapping[str, Figure]) -> str:
    return " | ".join(figures[name].spelt for name in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/responses"))
    parser.add_argument("--only", nargs="+", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--trial", action="store_true", help="two steps, four scenes; a copy of the page is filled"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    page, more = (trial_page(folder), TRIAL) if arguments.trial else (PAGE, ())
    scenes = 4 if arguments.trial else SCENES
    wanted = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    shuffle_images(folder)
    rank_pairs(folder, wanted)
    for at_once in ([row for row in wanted if not row.after], [row for row in wanted if row.after]):
        with ThreadPoolExecutor(arguments.side_by_side) as pool:
            list(pool.map(lambda row: train(folder, row, more), at_once))
    trained = [row for row in ROWS if (folder / row.name / "seconds.json").exists()]
    figures = table(folder, trained, scenes, filled(page, "responses"))
    fill(page, "responses", figures)
    print(figures)


if __name__ == "__main__":
    main()
