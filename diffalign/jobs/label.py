"""`diffalign label`: a page on which people choose, and the files made of their answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from diffalign import __version__
from diffalign import config as configs
from diffalign.commands import command
from diffalign.comparison.scored_images import columns_of_folder
from diffalign.config import MAY_CHANGE
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.scores import ScoreFile
from diffalign.data.responses.config import ResponseConfig
from diffalign.errors import ConfigError
from diffalign.files import read_text, write_atomically, write_json
from diffalign.generation.manifest import MANIFEST
from diffalign.jobs.check import SMALLEST_RESOLUTION, section_of
from diffalign.labelling.agreement import Agreement, agreement, of_models, sections, sentences
from diffalign.labelling.answers import AnswerFile
from diffalign.labelling.export import write_preferences, write_votes
from diffalign.labelling.items import AbstractItems
from diffalign.labelling.order import Order, ordered
from diffalign.labelling.session import Session
from diffalign.labelling.sources import (
    Compare,
    GroupsOfImages,
    PairsOfImages,
    PairsOfResponses,
    open_folder,
)
from diffalign.pages.environment import render
from diffalign.pages.guard import Guard
from diffalign.processes import only_writer
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.rollouts.groups import GROUPS

_SECTIONS = ("images", "data", "responses")
_QUESTIONS = {"images": "Which image is better?", "responses": "Which response is better?"}


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Ranged):
    """What people are shown, where, and what becomes of their answers.

    `diffalign label DATA` takes a folder of `diffalign generate`, a data set of image pairs, one of
    responses, or the `label.yaml` of earlier labels, and finds out by itself which it is.
    """

    images: Path | None = None
    """A folder of `diffalign generate`: its models side by side, or its seeds, or its groups with
    trajectories."""
    data: PairConfig | None = None
    """Pairs of images, labelled or not."""
    responses: ResponseConfig | None = None
    """Two responses to one conversation about images, labelled or not."""
    compare: Compare = "auto"
    """Of `images`: sides that differ in their model, from the same noise, or in their seed, of the
    same model. `auto` takes models where there are several."""
    together: bool = False
    """Of `images`: whether all images of a prompt are shown at once, to be ranked, in place of
    every two of them. Groups with trajectories always are."""
    question: str | None = None
    """What people are asked; null is "Which image is better?", or which response."""
    order: Order = "random"
    """Of the items, the same for everybody: `random` by the seed; `given`, as the data has them; or
    `disagreement`, those first about which scorers disagree most."""
    scores: dict[str, ScoreFile] = field(default_factory=dict)
    """For `order: disagreement`: two or more files that `diffalign score` wrote, by a name of your
    own. An image is found by its content and prompt. Empty takes those next to generated images,
    `scores/NAME.jsonl`."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Show only the first so many items of the order; null shows all."""
    people: Annotated[int, AtLeast(1)] | None = None
    """An item that so many people have answered is shown to no others; null shows every item to
    everybody."""
    seed: int = 0
    """Of the order, and of which side is left."""
    host: str = field(default="127.0.0.1", metadata=MAY_CHANGE)
    """Address to listen at. Any but 127.0.0.1, localhost and ::1 lets other machines in, and needs
    a password."""
    port: Annotated[int, Between(0, 65535)] = field(default=8000, metadata=MAY_CHANGE)
    """To listen at; 0 takes a free one and says which."""
    password_file: Path | None = field(default=None, metadata=MAY_CHANGE)
    """A file whose first line is the password that browsers ask for, next to any user name."""
    password_variable: str | None = field(default=None, metadata=MAY_CHANGE)
    """The environment variable that holds the password; null is DIFFALIGN_PASSWORD, where that is
    set."""
    output: Path = Path("runs/label")
    """Folder of the answers and of the files made of them; labels that are there go on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _SECTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of images, data and responses, got {' and '.join(given) or 'none'}"
            )
        if self.images is None and (self.together or self.compare != "auto"):
            name = "together" if self.together else "compare"
            raise ValueError(f"{name} is of images, a folder of diffalign generate: leave it out")
        if self.password_file is not None and self.password_variable is not None:
            raise ValueError("give the password in a file or in a variable, not in both")
        if self.scores and self.order != "disagreement":
            raise ValueError(
                f"scores are read for order: disagreement, and order is {self.order}: set it, or "
                f"leave scores out"
            )


def _next_to_images(config: LabelConfig) -> dict[str, ScoreFile]:
    """The files of scores of a generated folder, where they are read."""
    if config.images is None or config.order != "disagreement":
        return {}
    return {
        name: ScoreFile(file=file, scorer=file.stem)
        for name, file in columns_of_folder(config.images).items()
    }


def load(data: str | None, overrides: Sequence[str] = ()) -> LabelConfig:
    """The config for a path, a hub id, or the file of earlier labels.

    Args:
        data: as the first argument of the command line; None where overrides name the data.
        overrides: `key.path=value`.

    Raises:
        ConfigError: nothing is named, or a setting is not allowed.
        DataError: what is there can be compared in no way.
    """
    if data is not None and Path(data).suffix.lower() in (".yaml", ".yml"):
        return configs.load(LabelConfig, Path(data), overrides)
    tree = configs.tree(None, overrides)
    if data is not None:
        section = next((name for name in _SECTIONS if name in tree), None) or _section_of(data)
        if section == "images":
            tree["images"] = data
        else:
            tree[section] = {"path": data, **(tree.get(section) or {})}
    if not set(_SECTIONS) & set(tree):
        raise ConfigError(
            "label needs a folder of generated images or a data set, for example "
            "diffalign label runs/look or diffalign label pairs/"
        )
    if isinstance(tree.get("data"), dict):
        tree["data"].setdefault("resolution", SMALLEST_RESOLUTION)
    return configs.from_dict(LabelConfig, tree, place=configs.COMMAND_LINE)


def _section_of(data: str) -> str:
    if any((Path(data) / name).is_file() for name in (MANIFEST, GROUPS)):
        return "images"
    return section_of(data)


def run(config: LabelConfig, *, only_export: bool = False) -> Agreement:
    """Serve the page until it is stopped, then write the files.

    Args:
        config: what is shown and where.
        only_export: write the files of the answers that are there, and serve nothing.

    Raises:
        BusyError: another server writes into the same folder.
        ConfigError: it cannot listen there, or there is no password where one is needed.
        DataError: the data cannot be read, or the answers there are of other data.
    """
    console = Console(highlight=False)
    guard = Guard.of(config.host, password=_password(config))
    with only_writer(config.output, of="label"):
        items = _open(config)
        console.print(f"[bold]label[/bold]  {escape(items.summary)}", soft_wrap=True)
        for reason, count in items.passed_over.items():
            console.print(f"[yellow]{count:,} rows are not shown: {escape(reason)}[/yellow]")
        configs.save(config, config.output / "label.yaml")
        if not only_export:
            _serve(config, items, guard, console)
        return _export(config, items, console)


def _open(config: LabelConfig) -> AbstractItems:
    if config.images is not None:
        return open_folder(config.images, compare=config.compare, together=config.together)
    if config.data is not None:
        return PairsOfImages(config.data)
    assert config.responses is not None, "one of the three is given"
    return PairsOfResponses(config.responses)


def _password(config: LabelConfig) -> str | None:
    """The password, which no message shows; None where the settings name none.

    Raises:
        ConfigError: there is none where the settings say.
    """
    if config.password_file is not None:
        where = f"password_file {config.password_file}"
        lines = read_text(config.password_file, error=ConfigError).splitlines()
        password = lines[0].strip() if lines else ""
    elif config.password_variable is not None:
        where = f"the environment variable {config.password_variable}"
        password = os.environ.get(config.password_variable, "").strip()
    else:
        return None
    if not password:
        raise ConfigError(f"{where} holds no password: write one there, of 8 characters or more")
    return password


def _serve(config: LabelConfig, items: AbstractItems, guard: Guard, console: Console) -> None:
    try:
        from diffalign.labelling.server import Pages, listen, serve
    except ImportError as error:
        raise ConfigError(
            f"label needs the extra `label`, and {error.name} is not installed: "
            f"pip install 'diffalign[label]'"
        ) from error
    scores = config.scores or _next_to_images(config)
    order, unscored = ordered(items, config.order, seed=config.seed, scores=scores)
    if unscored:
        console.print(f"[yellow]{unscored:,} items have no scores, and come last[/yellow]")
    session = Session(
        items,
        config.output,
        order=order[: config.limit],
        seed=config.seed,
        people=config.people,
    )
    pages = Pages(
        session,
        guard,
        question=config.question or _QUESTIONS[items.shows],
        agreement=lambda: _page(agreement(items.items, session.standing())),
    )
    with listen(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        there = sum(len(own) for own in session.answers.by_person.values())
        console.print(
            f"{len(session.order):,} items, {there:,} answers so far. Open "
            f"[bold]http://{shown}:{port}[/bold] and stop with Ctrl-C: every answer is kept at "
            f"once in {escape(str(session.answers.path))}",
            soft_wrap=True,
        )
        serve(pages.app(), listener)


def _page(found: Agreement) -> str:
    return render("sections.html", title="Agreement", lead="", sections=sections(found))


def _export(config: LabelConfig, items: AbstractItems, console: Console) -> Agreement:
    answers = list(AnswerFile(config.output).all())
    found = agreement(items.items, answers)
    for line in [*sentences(found), *of_models(found)]:
        console.print(escape(line), soft_wrap=True)
    provenance: dict[str, Any] = {
        "diffalign": __version__,
        "data": items.summary,
        "fingerprint": items.fingerprint,
        "question": config.question or _QUESTIONS[items.shows],
        "order": config.order,
        "seed": config.seed,
        "answers": len(answers),
        "people": len(found.people),
        "alpha": found.alpha,
    }
    write_json(config.output / "agreement.json", {**provenance, **found.as_json()})
    write_atomically(config.output / "agreement.html", _page(found))
    if not answers:
        console.print("There is no answer yet, and so no file for training.")
        return found
    if isinstance(items, GroupsOfImages):
        preferences = write_preferences(answers, config.output)
        console.print(f"[green]Done:[/green] {preferences.path}: {preferences.said}")
    written = write_votes(items, answers, config.output, provenance)
    console.print(f"[green]Done:[/green] {written.path}: {written.said}", soft_wrap=True)
    console.print(f"Next: {_next(config, items)}", markup=False, soft_wrap=True)
    return found


def _next(config: LabelConfig, items: AbstractItems) -> str:
    """The command that trains on the answers."""
    folder = config.output
    if isinstance(items, GroupsOfImages):
        settings: dict[str, Any] = {
            "rollouts.trajectories": items.folder,
            "rollouts.preferences": folder / "preferences.jsonl",
        }
        return command("train", settings, config="configs/d3po/sd15_feedback.yaml")
    votes = {"kind": "votes"}
    if items.shows == "images":
        settings = {"data.path": folder / "pairs.parquet", "data.strength.preference": votes}
        return command("train", settings, config="configs/diffusion_dpo/sdxl_lora_24gb.yaml")
    settings = {
        "responses.path": folder / "responses.parquet",
        "responses.strength.preference": votes,
    }
    return command("train", settings, config="configs/dpo/llava15_7b.yaml")
