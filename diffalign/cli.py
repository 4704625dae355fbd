"""`diffalign JOB [CONFIG.yaml] [key=value ...]`: one short function per job.

Jobs are imported when they run, so that `--help` is instant.
"""

from __future__ import annotations

import json as json_text
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from diffalign import __version__, arguments, components, foreign_flags, keys, versions
from diffalign.arguments import Address, Engine, Processes, Settings, ShardOption
from diffalign.cli_images import images
from diffalign.errors import ConfigError, DiffalignError, ModelError
from diffalign.processes import end_with_launcher

if TYPE_CHECKING:
    from diffalign.training.config import RunConfig

app = typer.Typer(
    name="diffalign",
    help="Preference alignment of image generators and vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(images)

BENCHMARKS = "diffalign.benchmarks"


@app.command(
    epilog="Example: diffalign train configs/diffusion_dpo/sdxl_lora_24gb.yaml "
    "data.path=pairs.parquet output=runs/mine"
)
def train(
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option(help="Stop after every check, the first rows of the data included.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in its own folder from the newest checkpoint.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Continue from this checkpoint of the same run.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Start so many processes on this machine.")
    ] = 1,
) -> None:
    """Align a model with preferences; one YAML is one whole run."""
    path, overrides = arguments.split(settings)
    if path is None:
        raise ConfigError(
            "train needs a config file; ready-made ones lie in configs/", lacking=True
        )
    from diffalign.jobs import train as job
    from diffalign.training.checks import check
    from diffalign.training.launch import check_restarts, launch, restarted

    run, chosen = _run_of(path, overrides)
    if processes > 1 and not dry_run:
        check(run)  # once here, rather than one error from every process
        raise typer.Exit(launch([*_without_processes(sys.argv[1:]), *chosen], processes=processes))
    check_restarts()
    resume = resume or (restarted() and (run.output / "config.yaml").is_file())
    start = resume_from or (run.output if resume else None)
    job.run(run, dry_run=dry_run, resume=start, processes=processes)


@app.command(epilog="Example: diffalign precompute configs/diffusion_dpo/sdxl.yaml --processes 8")
def precompute(
    settings: Settings = None,
    processes: Processes = 1,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="File of scores (.parquet) of what the reference says of each image, or of "
            "numbers of each pair of responses, such as ches_normalised."
        ),
    ] = None,
) -> None:
    """Compute once what a training run needs of its data again and again, and keep it."""
    path, overrides = arguments.split(settings)
    if path is None:
        raise ConfigError(
            "precompute needs the config file of a training run, of images or of responses",
            lacking=True,
        )
    from diffalign.jobs import precompute as job

    shared = arguments.sharing(processes, engine, address, shard)
    job.run(
        _run_of(path, overrides)[0], named=[str(path), *overrides], sharing=shared, scores=scores
    )


@app.command(epilog="Example: diffalign plan configs/diffusion_dpo/sdxl_lora_24gb.yaml --gpu 24gb")
def plan(
    settings: Settings = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of a card, such as 24gb; else this machine's device.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")] = False,
) -> None:
    """Count the memory of a training run by part, and say whether it fits a device."""
    path, overrides = arguments.split(settings)
    if path is None:
        raise ConfigError("plan needs the config file of a training run", lacking=True)
    from diffalign.jobs import plan as job
    from diffalign.training import presets

    _, choice = presets.load(path, overrides)
    if choice is not None:
        typer.echo(choice.describe(), err=json)
        overrides = [*overrides, *choice.overrides, "preset=null"]
    job.run(lambda further: presets.load(path, [*overrides, *further])[0], gpu=gpu, as_json=json)


def _run_of(path: Path, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """A run, after saying what its preset chose; and overrides by which processes that are started
    need not choose again."""
    from diffalign.training import presets

    run, choice = presets.load(path, overrides)
    if choice is None:
        return run, []
    if int(os.environ.get("RANK", "0")) == 0:  # another launcher started every process with it
        typer.echo(choice.describe())
    return run, [*choice.overrides, "preset=null"]


@app.command(epilog="Example: diffalign export runs/mine form=single_file dtype=fp16")
def export(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN [key.path=value ...]", show_default=False),
    ] = None,
) -> None:
    """Write a trained model for ComfyUI, A1111, diffusers, peft or transformers."""
    from diffalign import config
    from diffalign.jobs import export as job

    run, overrides = arguments.subject(settings)
    if run is None:
        raise ConfigError(
            f"export takes the folder of a run, of a checkpoint or of an adapter first, as in "
            f"diffalign export runs/mine {' '.join(overrides)}".rstrip()
        )
    # Quoted, since a value is YAML.
    job.run(config.load(job.ExportConfig, None, [f"run={json_text.dumps(run)}", *overrides]))


@app.command(epilog="Example: diffalign convert ImageReward.pt output=imagereward.safetensors")
def convert(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="WEIGHTS [key.path=value ...]", show_default=False),
    ] = None,
) -> None:
    """Convert a pickled file of weights to safetensors, reading tensors and nothing else."""
    from diffalign import config
    from diffalign.jobs import convert as job

    weights, overrides = arguments.subject(settings)
    if weights is None:
        raise ConfigError("convert takes the file of weights first", lacking=True)
    named = f"weights={json_text.dumps(weights)}"
    job.run(config.load(job.ConvertConfig, None, [named, *overrides]))


@app.command(
    epilog="Example: diffalign evaluate chair captions=captions.jsonl objects=objects.json "
    "synonyms=synonyms.txt"
)
def evaluate(
    benchmark: Annotated[
        str, typer.Argument(help=f"One of {', '.join(components.folder_kinds(BENCHMARKS))}.")
    ],
    settings: Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")] = False,
    processes: Processes = 1,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
) -> None:
    """Evaluate responses about images: hallucination, recall and length, with intervals."""
    from diffalign import config
    from diffalign.benchmarks.base import AbstractBenchmark
    from diffalign.jobs import evaluate as job

    path, overrides = arguments.split(settings)
    cls = components.find(AbstractBenchmark, benchmark)  # type: ignore[type-abstract]
    shared = arguments.sharing(processes, engine, address, shard)
    job.run(config.load(cls, path, overrides), json_only=json, sharing=shared)


@app.command(epilog="Example: diffalign synthesise configs/synthesis/bdhs.yaml")
def synthesise(
    settings: Settings = None,
    processes: Processes = 1,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
) -> None:
    """Make preference data: rejected responses that the model itself helps to write."""
    from diffalign import config
    from diffalign.jobs import synthesise as job

    path, overrides = arguments.split(settings)
    shared = arguments.sharing(processes, engine, address, shard)
    job.run(config.load(job.SynthesiseConfig, path, overrides), shared)


@app.command(epilog="Example: diffalign diagnose runs/mine")
def diagnose(settings: Settings = None) -> None:
    """Show which words a run on responses made more or less probable, and where the model looks."""
    from diffalign import config
    from diffalign.jobs import diagnose as job

    folder, overrides = arguments.subject(settings)
    if folder is None:
        raise ConfigError("diagnose takes the folder of a run first", lacking=True)
    named = f"run={json_text.dumps(folder)}"
    job.run(config.load(job.DiagnoseConfig, None, [named, *overrides]))


@app.command(epilog="Example: diffalign demo --vlm")
def demo(
    settings: Settings = None,
    vlm: Annotated[
        bool, typer.Option("--vlm", help="Responses about images instead: the tiny LLaVA, mDPO.")
    ] = False,
) -> None:
    """Run the main job on the embedded playground: align, look, measure what changed."""
    from diffalign import config

    path, overrides = arguments.split(settings)
    if vlm:
        from diffalign.jobs import demo_responses as demo_responses

        demo_responses.run(config.load(demo_responses.ResponsesDemoConfig, path, overrides))
    else:
        from diffalign.jobs import demo as job

        job.run(config.load(job.DemoConfig, path, overrides))


@app.command(epilog="Example: diffalign env")
def env() -> None:
    """Print versions, devices and extras for a bug report."""
    from diffalign.jobs import env as job

    job.run()


def _without_processes(words: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in words:
        if skip:
            skip = False
        elif argument == "--processes":
            skip = True
        elif not argument.startswith("--processes="):
            kept.append(argument)
    return kept


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"diffalign {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Preference alignment of image generators and vision-language models."""


def _refuse_foreign_flags(words: list[str]) -> None:
    """Raise ConfigError where a job is given a flag that it does not have."""
    command = typer.main.get_command(app)
    job = getattr(command, "commands", {}).get(words[0]) if words else None
    if job is None:
        return
    options = {
        name
        for parameter in job.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }
    said = foreign_flags.translation(words[0], words[1:], {*options, "--help"})
    if said is not None:
        raise ConfigError(said)


def main() -> None:
    """Run the command line; errors meant for the user are printed alone and exit with 1."""
    end_with_launcher()
    try:
        _refuse_foreign_flags(sys.argv[1:])
        app()
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print(
                "Stopped by Ctrl-C. What is finished stays; start the same command again, a "
                "training run that has saved with --resume",
                file=sys.stderr,
            )
        raise
    except (DiffalignError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a library's, not the disk's or a path's
        of_library = isinstance(error, ModelError) and error.__cause__ is not None
        advice = versions.advice(error) if of_library else ""
        if isinstance(error, ConfigError) and error.lacking:
            advice = f"For example: {example(sys.argv[1:])}"
        _say(error, advice)
        sys.exit(1)
    except Exception as error:
        if not (advice := versions.advice(error)):
            raise
        if not isinstance(error, ImportError):
            traceback.print_exc()
        _say(error, advice)
        sys.exit(1)


def example(words: Sequence[str]) -> str:
    """The command that the help of a job ends with; empty where the first word is no job."""
    jobs = getattr(typer.main.get_command(app), "commands", {})
    job = jobs.get(words[0]) if words else None
    return "" if job is None else str(job.epilog).removeprefix("Example: ")


def _say(error: Exception, advice: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(f"[red bold]{type(error).__name__}[/]: ", end="")
    text = keys.hide(str(error)).encode(errors="backslashreplace").decode()
    console.print(text, markup=False, soft_wrap=True)
    if advice:
        console.print(advice, markup=False, soft_wrap=True)
