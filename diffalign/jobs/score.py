"""`diffalign score`: score generated images, or those of a data set, one file per scorer."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign import blocks, components, sessions
from diffalign import config as configs
from diffalign.calibration import agreement
from diffalign.commands import command
from diffalign.comparison.diversity import diversity_file, feature_figures, image_features
from diffalign.comparison.judged import (
    JudgementsPlan,
    Verdicts,
    log_odds_of,
    position_bias,
    read_verdicts,
    scores_of,
    write_bias,
    write_scores,
)
from diffalign.comparison.score import (
    SCORES,
    Problem,
    ScoresPlan,
    find_images,
    problems_of,
    scores_by_item,
)
from diffalign.comparison.score_pairs import PairScoresPlan
from diffalign.comparison.scored_images import (
    ImagesByPrompt,
    ScoredSource,
    of_data,
    of_folder,
)
from diffalign.comparison.tables import diversity_table
from diffalign.console import progress
from diffalign.data.pairs.config import PairConfig
from diffalign.data.score_columns import read_score_column
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import DataError
from diffalign.files import write_json
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.models.devices import choose_device
from diffalign.ranges import AtLeast, Ranged
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.images import AbstractImageScorer
from diffalign.scorers.pairwise import Pairwise
from diffalign.scorers.repeats import Perturbation

_LISTED_PROBLEMS = 10

Plan = ScoresPlan | PairScoresPlan | JudgementsPlan


@dataclass(frozen=True, kw_only=True)
class DataToScore:
    """A data set of pairs, by those keys of a run's `data` that say which images it has."""

    path: str
    """As `data.path` of a run; it is read at random."""
    kind: str = "auto"
    """As `data.kind`."""
    columns: dict[str, str] = field(default_factory=dict)
    """As `data.columns`."""
    split: str = "train"
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""

    def pairs(self) -> PairConfig:
        """The section of a run; images are scored as they are, whatever the resolution."""
        return PairConfig(resolution=8, **vars(self))


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Ranged):
    """Which images are scored by whom."""

    images: Path | None = None
    """Folder that `generate` filled, or one of images with captions: `x.png` next to `x.txt`."""
    data: DataToScore | None = None
    """In place of `images`, a data set of pairs: both images of every row, for `data.scores` of a
    run."""
    scorer: AbstractScorer
    """The scorer."""
    name: str | None = None
    """Of the column: `scores/NAME.jsonl` next to images, `OUTPUT/NAME.parquet` of a data set; null
    takes the scorer's kind."""
    output: Path | None = None
    """Folder that gets the scores of a data set."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Images scored at once."""
    repeats: Annotated[int, AtLeast(1)] = 1
    """How many copies of each image are scored, the image itself and slightly other ones: above 1
    there is a standard deviation next to their mean."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    """How the copies differ from the image."""
    diversity: bool = False
    """Say as well how much the images of one prompt differ, and how far they are from those of the
    first model, by the scorer's own features of them: a second pass of its image tower. The result
    lies next to the scores, `NAME.diversity.json`, and `compare` shows it."""
    agreement: bool = False
    """Of a data set, say as well how often the scorer agrees with its labels, and how well a
    difference of scores tells the odds: accuracy with an interval, the reliability curve and its
    calibration error, in `NAME.agreement.json`. Reads every image once more."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        if self.diversity and not getattr(self.scorer, "has_features", False):
            raise ValueError(
                f"diversity is measured by the scorer's features of images, and "
                f"{components.kind_of(self.scorer)} has none: use pickscore, clip, hpsv2 or "
                f"aesthetic, or leave diversity out"
            )
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(
                f"the name {self.name!r} becomes a file: use letters, digits, - _ . +, and begin "
                f"with a letter or digit"
            )

    def _check_source(self) -> None:
        if (self.images is None) == (self.data is None):
            raise ValueError(
                "what is scored is a folder (images=FOLDER) or a data set of pairs "
                "(data.path=DATA): give one of them"
            )
        if (self.data is None) != (self.output is None):
            raise ValueError(
                "output is the folder that gets the scores of a data set, and those of a folder of "
                "images lie in it: "
                + ("leave output out" if self.data is None else "give output=FOLDER")
            )
        if self.data is not None and self.diversity:
            raise ValueError(
                "diversity is of generated images, and data is a data set: leave it out"
            )
        if self.data is None and self.agreement:
            raise ValueError(
                "agreement is with the labels of a data set (data.path=DATA), and generated images "
                "have none: leave it out"
            )
        if self.repeats > 1 and self.scorer.compares:
            raise ValueError(
                f"repeats is {self.repeats}, and {components.kind_of(self.scorer)} compares the "
                f"images of a prompt, of which copies are not others: leave repeats out"
            )
        if self.repeats == 1 and self.perturbation != Perturbation():
            raise ValueError(
                "perturbation says how copies of an image differ, and repeats is 1, the image "
                "itself: set repeats to 4 or so, or leave perturbation out"
            )

    def column(self) -> Path:
        """The file that gets the scores."""
        kind = components.kind_of(self.scorer).rpartition(".")[2]
        name = self.name or kind
        if self.images is not None:
            return self.images / SCORES / f"{name}.jsonl"
        assert self.output is not None, "by __post_init__"
        return self.output / f"{name}.parquet"


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
    if config.images is not None and not config.images.is_dir():  # the lock would create it
        raise DataError(f"{config.images}: there is no such folder")
    with sessions.held(column.parent, of=column.stem, shard=sharing.shard) as session:
        make = blocks.Recipe(plan_of, config)
        plan = session.begin(make)
        console.print(f"[bold]score[/bold]  {escape(_planned(config, plan))}", soft_wrap=True)
        if not do_blocks(session, plan, make, sharing, console):
            return
        configs.save(config, column.with_suffix(".yaml"))
        _finish(console, config, plan, problems_of(session.failed))


def plan_of(config: ScoreConfig) -> Plan:
    """The scores of a config, as blocks; no weights are read."""
    shared: dict[str, Any] = {
        "batch_size": config.batch_size,
        "device": config.device,
        "place": lambda device: config.scorer.to(choose_device(device or config.device)),
    }
    if isinstance(config.scorer, Pairwise):
        return JudgementsPlan(images_of(config), config.scorer, config.column(), **shared)
    shared |= {"repeats": config.repeats, "perturbation": config.perturbation}
    if config.data is not None:
        return PairScoresPlan(config.data.pairs(), config.scorer, config.column(), **shared)
    assert config.images is not None, "by __post_init__"
    return ScoresPlan(find_images(config.images)[0], config.scorer, config.column(), **shared)


def images_of(config: ScoreConfig) -> ImagesByPrompt:
    """All images that a judge holds against each other, by prompt."""
    if config.data is not None:
        return of_data(config.data.pairs())
    assert config.images is not None, "by __post_init__"
    return of_folder(config.images)


def _planned(config: ScoreConfig, plan: Plan) -> str:
    """What is to be scored by whom, and how much of it is done."""
    scorer = f"with {config.column().stem}, {choose_device(config.device)}"
    if isinstance(plan, JudgementsPlan):
        return (
            f"{plan.images.summary}: {plan.pairs:,} pairs within prompts {scorer}, each in "
            f"both orders; {len(plan.known):,} verdicts are already there"
        )
    if isinstance(plan, PairScoresPlan):
        whole = f"{plan.data.summary}; {scorer}"
    else:
        whole = f"{len(plan.images)} images of {config.images} {scorer}"
    return f"{whole}; {len(plan.known)} scores are already there"


def _finish(console: Console, config: ScoreConfig, plan: Plan, problems: list[Problem]) -> None:
    """Say what the scores are, and raise DataError where images have none."""
    column = config.column()
    verdicts = None
    if isinstance(plan, JudgementsPlan):
        left_out, verdicts = _score_verdicts(console, config, plan, problems)
        problems = [*left_out, *problems]
    elif isinstance(plan, PairScoresPlan):
        _print_statistics(console, column)
    else:
        assert config.images is not None, "by __post_init__"
        problems = [*find_images(config.images)[1], *problems]
        console.print(f"[green]Done:[/green] scores in {escape(str(column))}", soft_wrap=True)
    if config.images is not None and (config.images / MANIFEST).is_file():
        _print_means(console, config.images, column)
        if config.diversity:
            scorer = config.scorer.to(choose_device(config.device))
            assert isinstance(scorer, AbstractImageScorer), "by __post_init__"
            _measure_diversity(console, config.images, column, scorer)
    if config.agreement and column.is_file():
        _measure_agreement(console, config, column, verdicts)
    _refuse(problems)
    if said := _next_step(config, plan):
        console.print(f"Next:{said}", markup=False, soft_wrap=True)


def _score_verdicts(
    console: Console, config: ScoreConfig, plan: JudgementsPlan, failed: list[Problem]
) -> tuple[list[Problem], Verdicts]:
    """Make scores of what a pair judge said of the images of each prompt.

    Returns:
        Images that could not be held against others, and the verdicts.
    """
    assert isinstance(config.scorer, Pairwise), "by plan_of"
    images, column = plan.images, config.column()
    verdicts = read_verdicts(plan.file_of_verdicts, config.scorer.fingerprint)
    scores = scores_of(verdicts, images.candidates)
    if not scores:
        _refuse(failed)
        raise DataError(
            f"{images.summary}: there is no prompt with two images to be compared: generate more "
            f"seeds of each prompt, or another model's images of it"
        )
    write_scores(column, config.scorer, scores)
    bias = position_bias(list(verdicts.values()))
    write_bias(column, bias)
    console.print(f"[green]Done:[/green] scores in {escape(str(column))}", soft_wrap=True)
    console.print(bias.in_words(), highlight=False, soft_wrap=True)
    if plan.alone:
        console.print(f"Without a score: {plan.alone:,} images that are the only one of a prompt")
    return [Problem(Path(row["name"]), row["reason"]) for row in images.left_out], verdicts


def _print_statistics(console: Console, column: Path) -> None:
    """Say how many scores a data set has, and which; nothing where it has none."""
    if not column.is_file():
        return
    rows = read_score_column(column).rows.values()
    known = [row.score for row in rows if row.score is not None]
    bad = f", {len(rows) - len(known):,} that cannot be read" if len(known) < len(rows) else ""
    console.print(
        f"[green]Done:[/green] {len(rows):,} images and prompts in {escape(str(column))}{bad}; "
        f"mean {statistics.fmean(known or [math.nan]):.4g}, standard deviation "
        f"{statistics.pstdev(known or [math.nan]):.4g}",
        soft_wrap=True,
    )


def _next_step(config: ScoreConfig, plan: Plan) -> str:
    """What to do with the scores, as it follows a colon; empty where nothing is to be said."""
    if isinstance(plan, PairScoresPlan):
        column = config.column()
        said = f"{column.stem}: {{file: {column}, scorer: {plan.identity.kind}}}"
        return f" name it in the data section of a run\n  scores: {{columns: {{{said}}}}}"
    folder = config.images
    if isinstance(plan, JudgementsPlan) or folder is None or not (folder / MANIFEST).is_file():
        return ""
    if len({row.model for row in read_manifest(folder)}) == 1:
        return " generate the same prompts with another model into this folder, to compare them"
    return f"\n  {command('compare', {'images': folder})}"


def _measure_agreement(
    console: Console, config: ScoreConfig, column: Path, verdicts: Verdicts | None = None
) -> None:
    """Compare the scores, or a judge's own verdicts, with the labels of the data set."""
    assert config.data is not None, "by __post_init__"
    source = ScoredSource(
        of_data(config.data.pairs()), {"score": read_score_column(column)}, by=None
    )
    known = [(pair, pair.group.gap(pair.places)) for pair in source.labelled()]
    if verdicts is not None:
        said = [(pair, log_odds_of(verdicts, *source.keys_of(pair))) for pair, _ in known]
        known = [(pair, gap) for pair, gap in said if gap is not None]
    found = agreement(
        [gap for _, gap in known],
        [pair.label for pair, _ in known],
        [pair.group.prompt for pair, _ in known],
    )
    if found is None:
        console.print("No agreement: the data set has no labelled pair whose images have scores")
        return
    write_json(column.with_suffix(".agreement.json"), found.to_dict())
    low, high = found.interval or (math.nan, math.nan)
    console.print(
        f"Agrees with {found.accuracy:.1%} of {found.curve.pairs:,} labelled pairs (95 % interval "
        f"{low:.1%} to {high:.1%}); calibration error {found.curve.error:.3f}, a difference of "
        f"scores taken for log-odds",
        soft_wrap=True,
    )
    table = Table("probability of the likelier side", "pairs", "said", "came true", box=None)
    for b in found.curve.bins:
        table.add_row(
            f"{b.low:.2f} to {b.high:.2f}", f"{b.pairs:,}", f"{b.said:.3f}", f"{b.came_true:.3f}"
        )
    console.print(table)


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
    baseline = next((row.model for row in rows), "")
    with progress(console, "diversity", len(rows)) as advance:
        features = image_features(images, rows, scorer.features, on_images=advance)
    figures = feature_figures(features, baseline)
    if "vendi_score" not in figures:
        console.print("No diversity: it takes two images of a prompt (seeds=2 or more)")
    if not figures:
        return
    write_json(diversity_file(column), figures)
    table = diversity_table(column.stem, figures)
    console.print(table.console())
    console.print(f"  {escape(table.explanation)}", soft_wrap=True)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        lines = [f"  {item.path}: {item.reason}" for item in problems[:_LISTED_PROBLEMS]]
        more = len(problems) - _LISTED_PROBLEMS
        one_or_more = f"{len(problems)} images have" if len(problems) > 1 else "1 image has"
        raise DataError(
            "\n".join(
                [
                    f"{one_or_more} no score; all others have theirs:",
                    *lines,
                    *([f"  and {more} more"] if more > 0 else []),
                ]
            )
        )
