"""`diffalign report RUN [RUN]`: one page of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from diffalign.errors import ConfigError
from diffalign.files import write_atomically, writing
from diffalign.reports.run_folder import RunFolder
from diffalign.reports.run_page import Embedded, page_of_runs

PAGE = "report.html"
MOST_RUNS = 6
"""As many as the curves of a chart have colours."""


def run(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of a run, whatever state it is in; of several, what they have in common.

    Args:
        runs: folders of training runs.
        output: the file; None is `report.html` in the folder of the run, and of several runs
            `report-with-NAMES.html` in that of the first.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run, the same one twice, or more than six.
        DataError: a folder is none of a run, or the page cannot be written.
    """
    console = Console(highlight=False)
    if not runs or len(runs) > MOST_RUNS:
        raise ConfigError(f"report takes 1 to {MOST_RUNS} folders of runs, got {len(runs)}")
    if len({path.resolve() for path in runs}) < len(runs):
        raise ConfigError("report was given the same run twice")
    found = [RunFolder.at(path) for path in runs]
    if output is None:
        others = "-and-".join(each.name for each in found[1:])
        output = runs[0] / (f"report-with-{others}.html" if others else PAGE)
    page = page_of_runs(found, Embedded(output))
    with writing(output):
        write_atomically(output, page)
    for problem in dict.fromkeys(said for each in found for said in each.problems):
        console.print(f"[yellow]{escape(problem)}", soft_wrap=True)
    console.print(f"[green]Done:[/green] {escape(str(output))}", soft_wrap=True)
    console.print(f"Next: open {output} in a browser", markup=False, soft_wrap=True)
    return output
