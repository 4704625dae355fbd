"""`diffalign evaluate`: benchmarks of responses about images, with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from diffalign import blocks, components, sessions
from diffalign import config as configs
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.report import LISTED, Report, as_dict, as_json, as_table, counts_line
from diffalign.benchmarks.several import (
    SeveralModels,
    compare_reports,
    differences_as_dict,
    explanation,
    several_table,
)
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import ConfigError
from diffalign.files import write_json_lines
from diffalign.generation.responses import ResponsesPlan
from diffalign.processes import only_writer


def run(
    benchmark: AbstractBenchmark, *, json_only: bool = False, sharing: Sharing | None = None
) -> Report | None:
    """Evaluate responses, print the figures, and save details where the settings name a file.

    With `also`, every model is evaluated, and one table holds them against the first.

    Args:
        benchmark: which responses, and how they are counted.
        json_only: print one JSON object and nothing else.
        sharing: which processes ask the model, where one is asked; None is this one.

    Returns:
        The figures, of several models those of the first; None where other shards still have to
        ask.

    Raises:
        BusyError: another command writes a file of this one.
        ConfigError: work shall be shared, and no model is asked; or two models share a file.
    """
    if not benchmark.also:
        return _one(benchmark, sharing or Sharing(), json_only=json_only, alone=True)
    reports: dict[str, Report] = {}
    for name, of_model in models_of(benchmark).items():
        if not json_only:
            Console(highlight=False).rule(escape(name), align="left")
        report = _one(of_model, sharing or Sharing(), json_only=json_only, alone=False)
        if report is None:
            return None
        reports[name] = report
    compared = compare_reports(reports)
    if json_only:
        print(json.dumps(_several_as_dict(compared), ensure_ascii=False))
    else:
        _print_several(compared)
    return reports[compared.first]


def models_of(benchmark: AbstractBenchmark) -> dict[str, AbstractBenchmark]:
    """The settings of every model of a table, by its name.

    Raises:
        ConfigError: a model's settings are wrong, two have one name, or share a file that a run
            writes.
    """
    settings = configs.to_dict(benchmark)
    also = settings.pop("also")
    if benchmark.called in also:
        raise ConfigError(
            f"also.{benchmark.called}: the first model is called so; set called=NAME for it"
        )
    found = {benchmark.called: benchmark}
    for name, changes in also.items():
        changed = _merged(settings, {"called": name, **changes})
        changed.pop("kind", None)
        found[name] = configs.from_dict(type(benchmark), changed, place=f"also.{name}")
    written: dict[Path, str] = {}
    for name, of_model in found.items():
        shared = {getattr(of_model, "verdicts", None)}  # a judge's verdicts name what they are of
        for file in sorted(of_model.written - shared):
            if file in written:
                raise ConfigError(
                    f"also.{name}: writes {file}, as {written[file]} does; give it a file of its "
                    f"own, such as also.{name}.asking.saves=FILE or also.{name}.details=FILE"
                )
            written[file] = name
    return found


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes in them, key by key at any depth."""
    merged = dict(settings)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _one(
    benchmark: AbstractBenchmark, shared: Sharing, *, json_only: bool, alone: bool
) -> Report | None:
    """Evaluate one model; where it is not the only one, nothing is said of what is next."""
    with ExitStack() as stack:
        saves = benchmark.asked_into
        if saves is None and shared != Sharing():
            raise ConfigError(
                f"evaluate {components.kind_of(benchmark)}: --processes, --engine and --shard "
                f"share the questions to a model, and here no model is asked: responses are read "
                f"from files. Leave them out"
            )
        own = frozenset() if saves is None else frozenset({saves})
        session = None
        if saves is not None:
            session = stack.enter_context(
                sessions.held(saves.parent, of=saves.name, shard=shared.shard)
            )
        if shared.shard is None:
            _hold(stack, benchmark.written - own)
        console = Console(highlight=False, quiet=json_only)
        kind = components.kind_of(benchmark)
        console.print(f"[bold]evaluate {kind}[/bold]  {escape(benchmark.plan())}", soft_wrap=True)
        if session is not None and not _ask(benchmark, session, shared):
            return None
        if shared.shard is not None:
            _hold(stack, benchmark.written - own)
        return _report(benchmark, kind, console, json_only=json_only, alone=alone)


def _hold(stack: ExitStack, files: Iterable[Path]) -> None:
    for file in sorted(files):
        stack.enter_context(only_writer(file.parent, of=file.name))


def plan_of(benchmark: AbstractBenchmark) -> ResponsesPlan:
    """The questions to the model of a benchmark, as blocks; no weights are read."""
    asked = benchmark.asked()
    assert asked is not None
    return ResponsesPlan(asked)


def _ask(benchmark: AbstractBenchmark, session: sessions.Session, sharing: Sharing) -> bool:
    """Have responses to all questions; False where other shards still have to ask."""
    make = blocks.Recipe(plan_of, benchmark)
    plan = session.begin(make)
    sharing.engine.check(plan.device)
    if session.pending:
        benchmark.check_to_ask()
        plan.check()
    return do_blocks(session, plan, make, sharing, Console(stderr=True, highlight=False))


def _report(
    benchmark: AbstractBenchmark, kind: str, console: Console, *, json_only: bool, alone: bool
) -> Report:
    report = benchmark.report()
    if benchmark.details is not None:
        write_json_lines(benchmark.details, report.details)
    if json_only:
        if alone:
            print(as_json(report))
        return report
    _print(report, console)
    if alone:
        _print_next(benchmark, kind, console)
    return report


def _several_as_dict(compared: SeveralModels) -> dict[str, Any]:
    return {
        "benchmark": compared.reports[compared.first].benchmark,
        "first": compared.first,
        "models": {name: as_dict(report) for name, report in compared.reports.items()},
        "differences": differences_as_dict(compared),
        "notes": list(compared.notes),
    }


def _print_several(compared: SeveralModels) -> None:
    console = Console(highlight=False)
    console.rule("All models", align="left")
    console.print(several_table(compared))
    console.print(explanation(compared), markup=False, soft_wrap=True)
    for note in compared.notes:
        console.print(f"[yellow]{escape(note)}", soft_wrap=True)


def _print(report: Report, console: Console) -> None:
    confidence = report.bootstrap.confidence
    for name, part in {report.benchmark: report.whole, **report.parts}.items():
        console.print(as_table(part, escape(name), confidence))
        console.print(f"[dim]{counts_line(part)}\n", soft_wrap=True)
    settings = "; ".join(f"{name}: {value}" for name, value in report.settings.items())
    console.print(settings, markup=False, soft_wrap=True)
    console.print(f"Intervals: {report.bootstrap.describe} of {report.resampled}")
    for reason, ids in report.left_out.items():
        if ids:
            listed = ", ".join(ids[:LISTED])
            more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
            console.print(
                f"[yellow]{len(ids)} {escape(reason)}[/]: {escape(listed)}{more}", soft_wrap=True
            )
    for note in report.remarks():
        console.print(f"[yellow]{escape(note)}", soft_wrap=True)


def _print_next(benchmark: AbstractBenchmark, kind: str, console: Console) -> None:
    if benchmark.details is not None:
        console.print(f"[green]Done:[/green] {escape(str(benchmark.details))}", soft_wrap=True)
    more = "--json for programs" if benchmark.details else "details=FILE.jsonl to see each response"
    console.print(
        f"Next: the same command with the other model, or its saved responses; {more}",
        markup=False,
        soft_wrap=True,
    )
