"""`diffalign evaluate`: benchmarks of responses about images, with intervals."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console
from rich.markup import escape

from diffalign import components
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.report import LISTED, Report, as_json, as_table, counts_line
from diffalign.files import write_json_lines
from diffalign.processes import only_writer


def run(benchmark: AbstractBenchmark, *, json_only: bool = False) -> Report:
    """Evaluate responses, print the figures, and save details where the settings name a file.

    Args:
        benchmark: which responses, and how they are counted.
        json_only: print one JSON object and nothing else.

    Raises:
        BusyError: another process writes a file of this one.
    """
    with ExitStack() as stack:
        for file in sorted(benchmark.written):
            stack.enter_context(only_writer(file.parent, of=file.name))
        return _run(benchmark, json_only=json_only)


def _run(benchmark: AbstractBenchmark, *, json_only: bool) -> Report:
    console = Console(highlight=False, quiet=json_only)
    kind = components.kind_of(benchmark)
    console.print(f"[bold]evaluate {kind}[/bold]  {escape(benchmark.plan())}", soft_wrap=True)
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
