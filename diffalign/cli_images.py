"""The commands that look at images and preferences: generate, score, choose, compare, tell."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from diffalign import arguments
from diffalign.arguments import Address, Engine, Processes, Settings, ShardOption

images = typer.Typer()


@images.command(
    epilog="Example: diffalign generate models.base=stabilityai/stable-diffusion-xl-base-1.0 "
    "models.aligned=runs/mine prompts.file=prompts.txt output=runs/look --grid"
)
def generate(
    settings: Settings = None,
    grid: Annotated[bool, typer.Option("--grid", help="Render the captioned grid.")] = False,
    processes: Processes = 1,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
) -> None:
    """Generate images: prompts x seeds x models, the same initial noise for every model."""
    from diffalign import config
    from diffalign.jobs import generate as job

    path, overrides = arguments.split(settings)
    shared = arguments.sharing(processes, engine, address, shard)
    job.run(config.load(job.GenerateConfig, path, overrides + ["grid=true"] * grid), shared)


@images.command(epilog="Example: diffalign score images=runs/look scorer.kind=pickscore")
def score(
    settings: Settings = None,
    processes: Processes = 1,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
) -> None:
    """Score generated images, or those of a data set of pairs, with a scorer."""
    from diffalign import config
    from diffalign.jobs import score as job

    path, overrides = arguments.split(settings)
    shared = arguments.sharing(processes, engine, address, shard)
    job.run(config.load(job.ScoreConfig, path, overrides), shared)


@images.command(epilog="Example: diffalign prefer images=runs/look output=runs/pairs")
def prefer(settings: Settings = None) -> None:
    """Make preference pairs of scored images: a data set for train."""
    from diffalign import config
    from diffalign.jobs import prefer as job

    path, overrides = arguments.split(settings)
    job.run(config.load(job.PreferConfig, path, overrides))


@images.command(epilog="Example: diffalign compare images=runs/look")
def compare(settings: Settings = None) -> None:
    """Compare models by scores, paired by prompt and seed: win rates, intervals, a report."""
    from diffalign import config
    from diffalign.jobs import compare as job

    path, overrides = arguments.split(settings)
    job.run(config.load(job.CompareConfig, path, overrides))


@images.command(
    "best-checkpoint",
    epilog="Example: diffalign best-checkpoint runs/mine prompts=prompts.txt scorer.kind=pickscore",
)
def best_checkpoint(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN|CONFIG.yaml [key.path=value ...]", show_default=False),
    ] = None,
) -> None:
    """Name the checkpoint of a run to use, by win rates against the base over drift."""
    from diffalign import config
    from diffalign.jobs import best_checkpoint as job

    path, overrides = arguments.split(settings)
    if path is not None and not path.is_file():  # quoted, since a value is YAML
        path, overrides = None, [f"run={json_text.dumps(str(path))}", *overrides]
    job.run(config.load(job.BestCheckpointConfig, path, overrides))


@images.command(epilog="Example: diffalign check pairs.parquet")
def check(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA or CONFIG.yaml] [key.path=value ...]", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")] = False,
) -> None:
    """Look for what is wrong with preference data; ends with 1 where something is."""
    from diffalign.jobs import check as job

    named, overrides = arguments.subject(data)
    config = job.load(named, overrides)
    if job.run(config, as_json_only=json).fails(config.fail_on):
        raise typer.Exit(1)


@images.command(epilog="Example: diffalign label runs/look people=3")
def label(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA or label.yaml] [key.path=value ...]", show_default=False),
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write the files of the answers, and serve nothing.")
    ] = False,
) -> None:
    """Serve a page on which people choose between images or responses, and keep their votes."""
    from diffalign.jobs import label as job

    named, overrides = arguments.subject(data)
    job.run(job.load(named, overrides), only_export=export)


@images.command(epilog="Example: diffalign report runs/mine runs/other")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Folders of training runs.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file; else report.html in the folder of the run.")
    ] = None,
) -> None:
    """Write one page of a run: curves, health, previews, results; of several, side by side."""
    from diffalign.jobs import report as job

    job.run(runs, output)


@images.command(epilog="Example: diffalign studio runs --port 8471")
def studio(
    folder: Annotated[Path, typer.Argument(help="Runs are looked for in it.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8470,
    address: Annotated[
        str, typer.Option(help="That it listens on; others than this machine's need a password.")
    ] = "127.0.0.1",
) -> None:
    """Browse runs, their previews and images, and hold two side by side; nothing is changed."""
    from diffalign.jobs import studio as job

    job.run(folder, address=address, port=port)
