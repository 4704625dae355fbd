"""`diffalign studio [FOLDER]`: runs, their pages and images in a browser; nothing is changed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from diffalign.errors import ConfigError, DataError
from diffalign.pages.guard import Guard
from diffalign.reports.run_folder import runs_below
from diffalign.reports.server import Studio, server_of


def run(folder: Path, *, address: str = "127.0.0.1", port: int = 8470) -> None:
    """Serve the runs of a folder until Ctrl-C.

    Args:
        folder: of runs, at most three levels deep, or of one run.
        address: that it listens on; one that other machines reach needs a password.
        port: 0 takes a free one.

    Raises:
        DataError: there is no such folder.
        ConfigError: an address that others reach has no password, or the port is taken.
    """
    console = Console(highlight=False)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the one that holds your runs")
    guard = Guard.of(address)
    try:
        server = server_of(Studio(folder), guard, port)
    except OSError as error:
        raise ConfigError(
            f"nothing can listen on {address} at port {port} ({error.strerror or error}): take "
            f"another with --port, or 0 for a free one"
        ) from error
    with server:
        found, shown = server.server_address[1], f"[{address}]" if ":" in address else address
        runs = len(runs_below(folder))
        console.print(f"{runs} runs in {folder}; nothing is changed. Ctrl-C ends it", markup=False)
        console.print(f"Next: open http://{shown}:{found} in a browser", markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("Ended")
