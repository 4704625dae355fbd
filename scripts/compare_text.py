"""An OCR reward on the world of text: D3PO and Diffusion-DPO, one table in docs/results.md.

    python scripts/compare_text.py                      # both, one after the other
    python scripts/compare_text.py --only dpo           # one; the other stays as it is
    python scripts/compare_text.py --only dpo --trial   # does it run? changes no page

D3PO samples by itself and is scored by what rapidocr reads; DPO learns from the shipped pairs,
whose labels come from the same reader. Base and trained models then sample the same (word, seed),
none of which is in a pair, and the table counts what is read exactly as asked. Words that no pair
and no prompt of training names are counted apart.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from compare_methods import PAGE, SAMPLER, SEEDS, TRIAL, Row, costs, evaluate, train, trial_page
from pages import fill, filled, merged

from diffalign.comparison.report import Result, percent, percent_interval
from diffalign.playground.models import playground_text_path
from diffalign.playground.text_images import HELD_OUT_WORDS, WORDS, prompt_of, reader

ROWS = (
    Row("dpo", "Diffusion-DPO, pairs labelled by OCR", "text_dpo.yaml"),
    Row("d3po", "D3PO, OCR scores its samples", "text_d3po.yaml"),
)


def table(
    folder: Path,
    rows: Sequence[Row],
    results: Sequence[Result],
    held_out: Sequence[Result],
    before: str,
) -> str:
    """The results as Markdown; rows that are not there are those of the table before."""
    base, base_held_out = results[0].comparison, held_out[0].comparison
    head = [
        "| model | read exactly (gain, 95 % interval) | wins / ties / losses "
        "| win rate of decided pairs (95 % interval) | held-out words | their wins / ties / losses "
        "| images read in training | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = {
        "base": f"| base | {percent(base.baseline_mean)} | | "
        f"| {percent(base_held_out.baseline_mean)} | | | |"
    }
    for row, result, other in zip(rows, results, held_out, strict=True):
        c, o = result.comparison, other.comparison
        _, scored, seconds = costs(folder / row.name)
        lines[row.title] = (
            f"| {row.title} | {percent(c.model_mean)} ({percent(c.mean_difference)}, "
            f"{percent_interval(c.mean_difference_interval)}) | {c.wins} / {c.ties} / {c.losses} "
            f"| {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {percent(o.model_mean)} | {o.wins} / {o.ties} / {o.losses} "
            f"| {scored:,} | {seconds:.0f} |"
        )
    return (
        merged(before, head, lines, ["base", *(row.title for row in ROWS)])
        + f"\n\n{base.items} images of {base.prompts} words, and {base_held_out.items} of "
        f"{base_held_out.prompts} held-out ones: {SEEDS} seeds, {SAMPLER.steps} steps, guidance "
        f"{SAMPLER.guidance:g}. CPU seconds: of the whole run, one thread. {os.cpu_count()} cores "
        f"({platform.machine()}, torch {torch.__version__}), by `python scripts/compare_text.py`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--only", nargs="+", default=[], choices=[row.name for row in ROWS])
    parser.add_argument(
        "--trial", action="store_true", help="two steps, two words; a copy of the page is filled"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    page, more = (trial_page(folder), TRIAL) if arguments.trial else (PAGE, ())
    for row in ROWS:
        if not arguments.only or row.name in arguments.only:
            train(folder, row, more)
    trained = [row for row in ROWS if (folder / row.name / "seconds.json").exists()]
    results, held_out = (
        evaluate(
            folder,
            folder / name,
            trained,
            [prompt_of(word) for word in words[: 2 if arguments.trial else None]],
            base=playground_text_path() / "sdxl",
            scorer=reader(measure="exact"),
        )
        for name, words in (("evaluation", WORDS), ("held_out", HELD_OUT_WORDS))
    )
    figures = table(folder, trained, results, held_out, filled(page, "text"))
    fill(page, "text", figures)
    print(figures)


if __name__ == "__main__":
    main()
