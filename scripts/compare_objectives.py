"""Offline objectives on the playground, and DPO on labels of which a quarter is wrong.

    python scripts/compare_objectives.py                     # both tables, two runs side by side
    python scripts/compare_objectives.py --only dpo ipo      # some; others stay as they are
    python scripts/compare_objectives.py --only dpo --trial  # does it run? changes no page

Each row is `configs/playground/diffusion_dpo.yaml` with another objective or other data: one base,
250 steps of 16 pairs, encodings that are computed once. Where SD 1.5 has a config, beta is a tenth
of the one there, as it is for DPO. Wrong labels: of every decided pair three annotators are asked,
each of whom is wrong with probability 0.25, and two scorers, each of whose gaps has the wrong sign
as often. Runs, evaluation and page are those of `compare_methods.py`.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compare_methods import PAGE, TRIAL, Row, call, costs, evaluate, train, trial_page
from pages import fill, filled, merged

from diffalign.comparison.report import percent, percent_interval
from diffalign.comparison.results import Result
from diffalign.playground.scenes import held_out_prompts

CONFIG = "diffusion_dpo.yaml"
PAIRS = Path("assets/playground/preferences")
FLIPPED = 0.25
SPREAD = 1.4826
"""Of the noise of a gap of 1 that has the wrong sign with probability 0.25."""


def row(name: str, title: str, objective: str, *more: str) -> Row:
    return Row(name, title, CONFIG, (f"objective={objective}", *more))


OBJECTIVES = (
    row("dpo", "dpo", "{kind: dpo, beta: 500}"),
    row("ipo", "ipo", "{kind: ipo, beta: 100}"),
    row("hinge", "hinge (SLiC)", "{kind: hinge, beta: 500}"),
    row("cdpo", "cdpo", "{kind: cdpo, beta: 500}"),
    row("robust", "robust", "{kind: robust, beta: 500}"),
    row("exo", "exo (DMPO)", "{kind: exo, beta: 200, epsilon: 0.01}"),
    row("nca", "nca", "{kind: nca, beta: 500}"),
    row("sppo", "sppo", "{kind: sppo, beta: 500}"),
    row("apo", "apo", "{kind: apo, beta: 500}"),
    row("f_dpo", "f_dpo", "{kind: f_dpo, beta: 1, divergence: js, scale: 500}"),
    row("discopop", "discopop", "{kind: discopop, beta: 500}"),
    row("two_betas", "two betas", "{kind: two_betas, beta: 500, beta_rejected: 250}"),
    row("aot", "aot", "{kind: aot, beta: 500}"),
    row(
        "diffusion_rpo",
        "diffusion_rpo",
        "{kind: diffusion_rpo, beta: 500, temperature: 0.5}",
        "likelihood.embedding=prompts",
    ),
    row("dspo", "dspo", "{kind: dspo, beta: 0.01}", "likelihood.distance=true"),
    row("kto", "kto (Diffusion-KTO)", "{kind: kto, beta: 200}"),
    row("bco", "bco", "{kind: bco, beta: 500}"),
    row("bco_pair", "bco_pair", "{kind: bco_pair, beta: 500}"),
    row(
        "margin_regression",
        "margin_regression (CoPG)",
        "{kind: margin_regression, beta: 500}",
        "data.strength.target={labels: 1}",
    ),
    row(
        "inpo",
        "InPO (dpo, inverted noise)",
        "{kind: dpo, beta: 500}",
        "likelihood.inversion={steps: 5}",
    ),
    row("mapo", "mapo", "{kind: mapo, beta: 0.1}"),
    row("simpo", "simpo", "{kind: simpo, beta: 500, gamma: 1}"),
    row("cpo", "cpo", "{kind: cpo, beta: 500}"),
    row(
        "rpo",
        "RPO (dpo + sft)",
        "{kind: weighted_sum, terms: [{objective: {kind: dpo, beta: 500}}, "
        "{objective: {kind: sft}, weight: 20}]}",
    ),
    row(
        "mpo",
        "MPO (dpo + bco_pair + sft)",
        "{kind: weighted_sum, terms: [{objective: {kind: dpo, beta: 500}, weight: 0.8}, "
        "{objective: {kind: bco_pair, beta: 500}, weight: 0.2}, "
        "{objective: {kind: sft}, weight: 20}]}",
    ),
    row("sft", "sft (chosen images alone)", "{kind: sft}"),
)
DPO = "{kind: dpo, beta: 500}"
LABELS = (
    row("one_vote", "dpo, one vote", DPO, "data.path={noisy}/one"),
    row(
        "one_robust",
        "robust, one vote",
        "{kind: robust, beta: 500, flip_rate: 0.25}",
        "data.path={noisy}/one",
    ),
    row("majority", "dpo, majority of three votes", DPO, "data.path={noisy}/majority"),
    row(
        "soft",
        "dpo, soft labels of three votes",
        DPO,
        "data.path={noisy}/three",
        "data.strength.preference={kind: votes}",
    ),
    row(
        "one_weak",
        "dpo with beta 150, one vote",
        "{kind: dpo, beta: 150}",
        "data.path={noisy}/one",
    ),
    row(
        "soft_weak",
        "dpo with beta 150, soft labels of three votes",
        "{kind: dpo, beta: 150}",
        "data.path={noisy}/three",
        "data.strength.preference={kind: votes}",
    ),
    row(
        "soft_sure",
        "dpo with beta 150, soft labels of three votes, prior 0.25",
        "{kind: dpo, beta: 150}",
        "data.path={noisy}/three",
        "data.strength.preference={kind: votes, prior: 0.25}",
    ),
    row(
        "smpo",
        "smpo, soft labels of three votes",
        "{kind: smpo, beta: 500, scale: 2}",
        "data.path={noisy}/three",
        "data.strength.preference={kind: votes}",
    ),
    row(
        "scorers",
        "dpo, one vote, strength from two scorers",
        DPO,
        "data.path={noisy}/one",
        "data.strength.columns={mean: 'mean_0, mean_1'}",
        "data.strength.preference={kind: gap, of: mean, temperature: 0.55}",
    ),
    replace(OBJECTIVES[0], title="dpo, no wrong labels"),
)
"""In `{noisy}` is what `write_noisy` makes. The temperature makes of the mean of two gaps of 1 with
that noise the probability that its sign is right."""


def write_noisy(folder: Path) -> None:
    """Copies of the pairs with wrong labels: of one vote, of three, of the majority of three."""
    pairs = pq.read_table(PAIRS / "train.parquet")
    first = np.asarray(pairs["label_0"])
    pairs, first = pairs.filter(pa.array(first != 0.5)), first[first != 0.5]
    chance = np.random.default_rng(0)
    votes = np.where(chance.random((3, len(first))) < FLIPPED, 1 - first, first)
    gaps = 2 * first - 1 + SPREAD * chance.standard_normal((2, len(first)))
    of_scorers = {"mean_0": gaps.mean(axis=0) / 2, "mean_1": -gaps.mean(axis=0) / 2}
    majority = np.median(votes, axis=0, keepdims=True)
    for name, counted in (("one", votes[:1]), ("three", votes), ("majority", majority)):
        told = {"label_0": counted.sum(axis=0), "label_1": (1 - counted).sum(axis=0), **of_scorers}
        table = pairs.drop_columns(["label_0", "label_1"])
        for column, values in told.items():
            table = table.append_column(column, pa.array(values))
        (folder / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name / "train.parquet")


def settings(folder: Path, each: Row) -> tuple[str, ...]:
    """Of a run: those of its row, with encodings that all runs on the same data share."""
    given = [text.replace("{noisy}", str(folder / "noisy")) for text in each.overrides]
    data = [Path(text).name for text in given if text.startswith("data.path=")] or ["shipped"]
    encodings = folder / "encodings" / data[0]
    return (*given, "model.encoders=cached", f"encodings_cache={encodings}")


def table(folder: Path, rows: Sequence[Row], results: Sequence[Result], before: str) -> str:
    """The results as Markdown; rows that are not there are those of the table before."""
    base = results[0].comparison
    head = [
        "| objective | win rate of decided pairs (95 % interval) | wins / ties / losses "
        "| fidelity (gain, 95 % interval) | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    lines = {"base": f"| base | | | {percent(base.baseline_mean)} | |"}
    for each, result in zip(rows, results, strict=True):
        c = result.comparison
        lines[each.title] = (
            f"| {each.title} | {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {c.wins} / {c.ties} / {c.losses} | {percent(c.model_mean)} "
            f"({percent(c.mean_difference)}, {percent_interval(c.mean_difference_interval)}) "
            f"| {costs(folder / each.name)[2]:.0f} |"
        )
    titles = ["base", *(each.title for each in (*OBJECTIVES, *LABELS))]
    return (
        merged(before, head, lines, titles)
        + f"\n\n{base.items} images of {base.prompts} held-out prompts. {os.cpu_count()} cores "
        f"({platform.machine()}, torch {torch.__version__}), by `python "
        f"scripts/compare_objectives.py`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = {each.name: each for each in (*OBJECTIVES, *LABELS)}
    parser.add_argument("--folder", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", nargs="+", default=[], choices=list(rows))
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--trial", action="store_true", help="two steps, two prompts; a copy of the page is filled"
    )
    options = parser.parse_args()
    folder: Path = options.folder
    page, more = (trial_page(folder), TRIAL) if options.trial else (PAGE, ())
    write_noisy(folder / "noisy")
    rows = {name: replace(each, overrides=settings(folder, each)) for name, each in rows.items()}
    wanted = [each for name, each in rows.items() if not options.only or name in options.only]
    encodings = {each.overrides[-1]: each.overrides for each in reversed(rows.values())}
    for given in (encodings[place] for place in {each.overrides[-1] for each in wanted}):
        command = ["-m", "diffalign", "precompute", f"configs/playground/{CONFIG}", *given]
        call([*command, f"output={folder / 'precomputed'}"], folder / "encodings.log")
    with ThreadPoolExecutor(options.side_by_side) as pool:
        list(pool.map(lambda each: train(folder, each, more), wanted))
    for marker, family in (("objectives", OBJECTIVES), ("labels", LABELS)):
        trained = [each for each in family if (folder / each.name / "seconds.json").exists()]
        if trained:
            prompts = held_out_prompts()[: 2 if options.trial else None]
            results = evaluate(folder, folder / f"{marker}_evaluation", trained, prompts)
            figures = table(folder, trained, results, filled(page, marker))
            fill(page, marker, figures)
            print(figures)


if __name__ == "__main__":
    main()
