"""`diffalign score`: scorer generated images, one column file per scorer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign import blocks, components, sessions
from diffalign import config as configs
from diffalign.commands import command
from diffalign.comparison.diversity import diversity, feature_distance
from diffalign.comparison.score import (
    SCORES,
    Problem,
    ScoresPlan,
    find_images,
    problems_of,
    scores_by_item,
)
from diffalign.console import progress
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import DataError
from diffalign.files import write_json
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.models.devices import choose_device
from diffalign.ranges import AtLeast, Ranged
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.images import AbstractImageScorer

_LISTED_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Ranged):
    """Which images are scored by whom."""

    images: Path
    """Folder that `generate` filled, or one of images with captions: `x.png` next to `x.txt`."""
    scorer: AbstractScorer
    """The scorer."""
    name: str | None = None
    """Of the column: `scores/NAME.jsonl`; null takes the scorer's kind."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Images scored at once."""
    diversity: bool = False
    """Say as well how much the images of one prompt differ, by the scorer's own features of them:
    a second pass of its image tower. The result lies next to the scores, `NAME.diversity.json`."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diversity and not getattr(self.scorer, "has_features", False):
            raise ValueError(
                f"diversity is measured by the scorer's features of images, and "
                f"{components.kind_of(self.scorer)} has none: use pickscore or clip, or leave "
                f"diversity out"
            )
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(
                f"the name {self.name!r} becomes a file: use letters, digits, - _ . +, and begin "
                f"with a letter or digit"
            )

    def column(self) -> Path:
        """The file that gets the scores."""
        kind = components.kind_of(self.scorer).rpartition(".")[2]
        return self.images / SCORES / f"{self.name or kind}.jsonl"


def suggestion(images: Path) -> str:
    """How to call this job on a folder that has no scores yet, and whose scorer is the user's."""
    return (
        f"  {command('score', {'images': images, 'scorer.kind': 'pickscore'})}\n"
        f"(or clip, jpeg, one of your own such as my_package.my_module; and for the playground's "
        f"images diffalign.playground.oracle)"
    )


def run(config: ScoreConfig, sharing: Sharing | None = None) -> None:
    """Score what has no score yet.

    Args:
        config: which images, and by whom they are scored.
        sharing: which processes do it; None is this one.

    Raises:
        BusyError: another command writes the same column.
        DataError: at the end, if images could not be scored; all others have their scores.
    """
    console = Console(highlight=False)
    sharing = sharing or Sharing()
    sharing.engine.check(config.device)
    column = config.column()
    if not config.images.is_dir():  # the lock would create it
        raise DataError(f"{config.images}: there is no such folder")
    with sessions.held(column.parent, of=column.stem, shard=sharing.shard) as session:
        _score(console, config, column, session, sharing)


def plan_of(config: ScoreConfig) -> ScoresPlan:
    """The scores of a config, as blocks; no weights are read."""
    return ScoresPlan(
        find_images(config.images)[0],
        config.scorer,
        config.column(),
        batch_size=config.batch_size,
        device=config.device,
        place=lambda device: config.scorer.to(choose_device(device or config.device)),
    )


def _score(
    console: Console, config: ScoreConfig, column: Path, session: sessions.Session, sharing: Sharing
) -> None:
    make = blocks.Recipe(plan_of, config)
    images, problems = find_images(config.images)
    plan = session.begin(make)
    console.print(
        f"[bold]score[/bold]  {len(images)} images of {escape(str(config.images))} with "
        f"{column.stem}, {choose_device(config.device)}; {len(plan.known)} scores are already "
        f"there",
        soft_wrap=True,
    )
    if not do_blocks(session, plan, make, sharing, console):
        return
    problems += problems_of(session.failed)
    configs.save(config, column.with_suffix(".yaml"))
    console.print(f"[green]Done:[/green] scores in {escape(str(column))}", soft_wrap=True)
    if (config.images / MANIFEST).is_file():
        _print_means(console, config.images, column)
        if config.diversity:
            scorer = config.scorer.to(choose_device(config.device))
            assert isinstance(scorer, AbstractImageScorer), "by __post_init__"
            _measure_diversity(console, config.images, column, scorer)
    _refuse(problems)
    if (config.images / MANIFEST).is_file():
        alone = len({row.model for row in read_manifest(config.images)}) == 1
        console.print(
            "Next: generate the same prompts with another model into this folder, to compare them"
            if alone
            else f"Next:\n  {command('compare', {'images': config.images})}",
            markup=False,
            soft_wrap=True,
        )


def _print_means(console: Console, images: Path, column: Path) -> None:
    scores = scores_by_item(images, column)
    by_model: dict[str, list[float]] = {}
    for (model, _, _), score in scores.items():
        by_model.setdefault(model, []).append(score)
    table = Table("model", "images", "mean score", box=None)
    for model, values in by_model.items():
        table.add_row(model, str(len(values)), f"{sum(values) / len(values):.4f}")
    console.print(table)


def _measure_diversity(
    console: Console, images: Path, column: Path, scorer: AbstractImageScorer
) -> None:
    rows = [row for row in read_manifest(images) if (images / row.file).is_file()]
    with progress(console, "diversity", len(rows)) as advance:
        found = diversity(images, rows, feature_distance(scorer.features), on_prompt=advance)
    if not found:
        console.print("No diversity: it takes two images of a prompt (seeds=2 or more)")
        return
    write_json(column.with_suffix(".diversity.json"), {"mean_cosine_distance": found})
    table = Table("model", "diversity (mean cosine distance of a prompt's images)", box=None)
    for model, value in found.items():
        table.add_row(model, f"{value:.4f}")
    console.print(table)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        lines = [f"  {item.path}: {item.reason}" for item in problems[:_LISTED_PROBLEMS]]
        more = len(problems) - _LISTED_PROBLEMS
        raise DataError(
            "\n".join(
                [
                    f"{len(problems)} images have no score; all others have theirs:",
                    *lines,
                    *([f"  and {more} more"] if more > 0 else []),
                ]
            )
        )
