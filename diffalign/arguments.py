"""Arguments and options that commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffalign.engines.base import Sharing

Processes = Annotated[
    int, typer.Option(min=1, help="Workers: processes of this machine, one a GPU, or Ray's actors.")
]
Engine = Annotated[str, typer.Option(help="Who does the work: local or ray.")]
Address = Annotated[
    str | None, typer.Option(help="HOST:PORT of the Ray cluster to join; else RAY_ADDRESS.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do the I-th of N shares; others do the rest."),
]

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [key.path=value ...]", show_default=False),
]


def split(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """A config file, if the first argument is none of the overrides, and the overrides."""
    arguments = list(arguments or [])
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def subject(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """What a job is of, such as a folder, if the first argument is none of the overrides; and the
    overrides."""
    first, *overrides = arguments or [""]
    if "=" in first and not Path(first).exists():
        return None, [first, *overrides]
    return first or None, overrides


def sharing(processes: int, engine: str, address: str | None, shard: str | None) -> Sharing:
    """Who does the blocks of a job."""
    from diffalign.engines.base import Sharing

    return Sharing.of(processes=processes, engine=engine, address=address, shard=shard)
