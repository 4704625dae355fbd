"""The charts of a run, and of several runs on the same axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffalign.pages.charts import chart, charts, curve_of
from diffalign.pages.parts import Html, fold
from diffalign.reports.run_folder import RunFolder

MAIN: Mapping[str, tuple[tuple[str, ...], float | None]] = {
    "loss": (("loss", "held_out/loss"), None),
    "accuracy": (("accuracy", "held_out/accuracy"), 0.5),
    "margin": (("margin",), 0.0),
    "rewards": (("chosen_reward", "rejected_reward"), 0.0),
    "drift from the reference": (
        *(("drift/chosen", "drift/rejected", "held_out/drift/chosen", "held_out/drift/rejected"),),
        0.0,
    ),
    "error": (("error/chosen", "error/rejected"), None),
    "log-probability per token": (("log_prob/chosen", "log_prob/rejected"), None),
    "gradient norm": (("grad_norm",), None),
    "learning rate": (("lr",), None),
}
"""Title of a chart -> its figures, and a value that gets a line; all other figures are below."""


def accuracies_of(run: RunFolder) -> list[str]:
    """Names of the accuracies of the terms of a sum, such as `dpo/accuracy`."""
    ends = [name for name in run.figures if name.endswith("/accuracy")]
    return [name for name in ends if name.count("/") == 1 and not name.startswith("held_out/")]


def curves_of(run: RunFolder) -> list[Html]:
    """The charts of one run: the main figures, then all others by what stands in front of `/`."""
    shown: set[str] = set()
    main = []
    for title, (names, mark) in MAIN.items():
        there = [name for name in names if name in run.figures]
        if title == "accuracy" and "accuracy" not in there:
            there += accuracies_of(run)
        main.append(chart(title, [curve_of(run.rows, n) for n in there], mark=mark))
        shown |= set(there)
    rounds = [name for name in run.figures if name.startswith("round/")]
    for name in rounds:
        if name.endswith("_mean"):
            main.append(chart(name, [curve_of(run.rows, name)]))
            shown.add(name)
    ends = {f"{name}{end}" for name in run.figures for end in ("_low", "_high")}
    rest: dict[str, list[str]] = {}
    for name in run.figures:
        if name not in shown and name not in ends:
            rest.setdefault(name.rpartition("/")[0] or name, []).append(name)
    others = [
        chart(title, [curve_of(run.rows, name) for name in names[start : start + 6]])
        for title, names in rest.items()
        for start in range(0, len(names), 6)
    ]
    return [
        charts(main),
        fold(f"All other figures ({sum(map(len, rest.values()))})", charts(others)),
    ]


def shared_curves(runs: Sequence[RunFolder]) -> list[Html]:
    """A chart a figure, with a curve of each run that has it."""
    main = [name for names, _ in MAIN.values() for name in names]
    names = dict.fromkeys(name for run in runs for name in run.figures)
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high")}

    def of(name: str) -> Html:
        has = [run for run in runs if name in run.figures]
        return chart(name, [curve_of(run.rows, name, run.name) for run in has])

    first = [of(name) for name in main if name in names]
    others = [of(name) for name in names if name not in main and name not in ends]
    return [
        charts(first),
        fold(f"All other figures ({len(others)})", charts(others)),
    ]
