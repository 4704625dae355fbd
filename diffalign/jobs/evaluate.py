"""`diffalign evaluate`: benchmarks of responses about images, with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from diffalign import blocks, components, sessions
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.report import LISTED, Report, as_json, as_table, counts_line
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import ConfigError
from diffalign.files import write_json_lines
from diffalign.generation.responses import ResponsesPlan
from diffalign.processes import only_writer


def run(
    benchmark: AbstractBenchmark, *, json_only: bool = False, sharing: Sharing | None = None
) -> Report | None:
    """Evaluate responses, print the figures, and save details where the settings name a file.

    Args:
        benchmark: which responses, and how they are counted.
        json_only: print one JSON object and nothing else.
        sharing: which processes ask the model, where one is asked; None is this one.

    Returns:
        The figures; None where other shards still have to ask.

    Raises:
        BusyError: another command writes a file of this one.
        ConfigError: work shall be shared, and no model is asked.
    """
    shared = sharing or Sharing()
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
        return _report(benchmark, kind, console, json_only=json_only)


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
    benchmark: AbstractBenchmark, kind: str, console: Console, *, json_only: bool
) -> Report:
    report = benchmark.report()
    if benchmark.details is not None:
        write_json_lines(benchmark.details, report.details)
    if json_only:
        print(as_json(report))
    else:
        _print(report, console)
        _print_next(benchmark, kind, console)
    return report


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
