"""`diffalign prefer`: pairs of scored images, as a data set that `train` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign import __version__, components
from diffalign import config as configs
from diffalign.commands import command
from diffalign.comparison.scored_images import (
    ImagesByPrompt,
    ScoredSource,
    columns_of_folder,
    of_data,
    of_folder,
    read_columns,
)
from diffalign.comparison.written_pairs import MadePair, made_pairs, write_pairs
from diffalign.data.pairs.scores import ENSEMBLE
from diffalign.data.score_columns import ScoreColumn
from diffalign.data.strength.gap import sigmoid
from diffalign.errors import DataError
from diffalign.files import write_json_lines
from diffalign.jobs.score import DataToScore
from diffalign.pair_rules.base import AbstractPairRule, Pair, uniforms
from diffalign.pair_rules.best_worst import BestWorst
from diffalign.processes import only_writer
from diffalign.ranges import AtLeast, MoreThan, Ranged

PAIRS = "train.parquet"
LEFT_OUT = "left_out.jsonl"
_LISTED = 5
_STRENGTH = "{columns: {p: preference_0}, preference: {kind: given, of: p}}"
"""How a run reads the probabilities of the pairs."""


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(DataToScore):
    """Pairs that people labelled, with scores of their images."""

    scores: dict[str, Path]
    """As `scores` of the job: the same names, of the same scorers."""


@dataclass(frozen=True, kw_only=True)
class PreferConfig(Ranged):
    """Which images become pairs, by which scores and which rule."""

    images: Path | None = None
    """Folder that `generate` filled and `score` scored, or one of images with captions."""
    models: tuple[str, ...] = ()
    """Of a folder that `generate` filled, whose images; empty takes those of all models."""
    data: DataToScore | None = None
    """In place of `images`, a data set of pairs or groups: all images of a prompt, whichever rows
    they are in, are compared with each other."""
    scores: dict[str, Path] = field(default_factory=dict)
    """A name of your own -> a file of scores that `diffalign score` wrote: `scores/KIND.jsonl` next
    to images, `KIND.parquet` of a data set. Empty takes all files next to the images."""
    by: str | None = None
    """Which score says who is preferred: a name under `scores`, or `ensemble`, the mean of all in
    units of the spread of each. Null is the only one, or the ensemble of several."""
    rule: AbstractPairRule = field(default_factory=BestWorst)
    """Which pairs are made of the images of a prompt."""
    labelled: LabelledConfig | None = None
    """For the rule `reliable`: pairs that people labelled. Null takes the labels of `data`."""
    temperature: Annotated[float, MoreThan(0)] | None = None
    """Gap of the score at which the odds are e to 1: pairs then carry the probability that the
    preferred image is the better one, as `preference_0`. 1 for scores that are log-odds, such as
    pickscore. Null writes none."""
    pairs_per_prompt: Annotated[int, AtLeast(1)] | None = None
    """How many pairs of a prompt are kept at most, the first of the rule; null for all."""
    seed: int = 0
    """Of the random choices of a rule."""
    output: Path
    """Folder that gets `train.parquet`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.data is None):
            raise ValueError(
                "pairs are made of a folder (images=FOLDER) or of a data set (data.path=DATA): "
                "give one of them"
            )
        if self.data is not None and not self.scores:
            raise ValueError(
                "scores names no file, and those of a data set lie where `diffalign score "
                "data.path=DATA` was told to: give scores.NAME=FILE.parquet"
            )
        for name in self.scores:
            if not name.isidentifier() or name == ENSEMBLE:
                raise ValueError(
                    f"scores.{name}: a name is of letters, digits and underscores, and not "
                    f"{ENSEMBLE}"
                )
        if self.data is not None and self.models:
            raise ValueError("models chooses among generated images, and data is a data set")
        if self.labelled is not None and not self.rule.needs_labels:
            raise ValueError(
                f"labelled is for the rule reliable, and rule is {components.kind_of(self.rule)}: "
                f"leave it out"
            )
        if self.rule.needs_labels and self.labelled is None and self.data is None:
            raise ValueError(
                "rule reliable is chosen by pairs that people labelled, and generated images have "
                "no labels: give labelled.path and labelled.scores"
            )


def run(config: PreferConfig) -> Path:
    """Make the pairs.

    Writes `train.parquet`, `prefer.yaml` and, where images or rows are left out, `left_out.jsonl`.

    Returns:
        The data set.

    Raises:
        DataError: there are pairs in the folder already; there are no images, scores or pairs.
    """
    console = Console(highlight=False)
    path = config.output / PAIRS
    with only_writer(config.output):
        if path.exists():
            raise DataError(f"{path} is there already: choose another output, or delete it")
        images, columns = _source(config)
        source = ScoredSource(images, columns, config.by)
        if config.rule.reads_all_scorers and len(columns) < 2:
            raise DataError(
                f"rule {components.kind_of(config.rule)} compares by several scores, and there is "
                f"{', '.join(columns)} alone: score the images with another scorer, or take a rule "
                f"such as best_worst"
            )
        fitted = config.rule.fitted(_labelled(config, source))
        console.print(
            f"[bold]prefer[/bold]  {escape(images.summary)}: {len(images.candidates):,} images of "
            f"{len(source.prompts):,} prompts by {source.by}; {escape(fitted.rule.describe())}",
            soft_wrap=True,
        )
        pairs = _pairs(config, source, fitted.rule)
        made = made_pairs(source, pairs)
        if not made:
            raise DataError(
                f"{images.summary}: no pair comes of {len(source.prompts):,} prompts. A pair takes "
                f"two images of a prompt whose scores differ as the rule asks: generate more "
                f"images of each prompt (seeds), or take a wider rule"
            )
        provenance = _provenance(config, source, fitted.findings, made)
        write_pairs(path, source, made, provenance, temperature=config.temperature)
        configs.save(config, config.output / "prefer.yaml")
        if images.left_out:
            write_json_lines(config.output / LEFT_OUT, images.left_out)
    _print(console, config, source, pairs, made, fitted.findings)
    return path


def _source(config: PreferConfig) -> tuple[ImagesByPrompt, dict[str, ScoreColumn]]:
    if config.data is not None:
        return of_data(config.data.pairs()), read_columns(config.scores)
    assert config.images is not None, "by __post_init__"
    if not config.images.is_dir():
        raise DataError(f"{config.images}: there is no such folder")
    files = config.scores or columns_of_folder(config.images)
    if not files:
        raise DataError(
            f"{config.images} has no scores yet. Score its images first:\n  "
            + command("score", {"images": config.images, "scorer.kind": "pickscore"})
        )
    return of_folder(config.images, config.models), read_columns(files)


def _labelled(config: PreferConfig, source: ScoredSource) -> list[Any]:
    if not config.rule.needs_labels:
        return []
    if config.labelled is None:
        return list(source.labelled())
    columns = read_columns(config.labelled.scores)
    if missing := sorted(source.columns.keys() - columns.keys()):
        raise DataError(
            f"labelled.scores has no {', '.join(missing)}, by which images are compared: score the "
            f"labelled pairs with it as well"
        )
    columns = {name: columns[name] for name in source.columns}
    for name, column in columns.items():
        own = source.columns[name].scorer.fingerprint
        if column.scorer.fingerprint != own:
            raise DataError(
                f"labelled.scores.{name}: {column.path} is by {column.scorer.fingerprint}, and the "
                f"images are scored by {own}: score the labelled pairs with the same scorer"
            )
    parts = {name: value for name, value in vars(config.labelled).items() if name != "scores"}
    return list(ScoredSource(of_data(DataToScore(**parts).pairs()), columns, source.by).labelled())


def _pairs(
    config: PreferConfig, source: ScoredSource, rule: AbstractPairRule
) -> dict[str, list[Pair]]:
    """The pairs of every prompt that has two images or more."""
    found = {}
    for prompt in source.prompts:
        group = source.group(prompt)
        if len(group) > 1:
            made = rule.pairs(group, uniforms(config.seed, prompt))
            found[prompt] = made[: config.pairs_per_prompt]
    return found


def _provenance(
    config: PreferConfig,
    source: ScoredSource,
    findings: Mapping[str, Any],
    made: list[MadePair],
) -> dict[str, Any]:
    """How the pairs came to be: what `read_provenance` gives back."""
    return {
        "diffalign": __version__,
        "config": configs.to_dict(config),
        "scorers": {
            name: {
                "kind": column.scorer.kind,
                "settings": dict(column.scorer.settings),
                "fingerprint": column.scorer.whole_fingerprint,
                "digest": column.digest(),
            }
            for name, column in source.columns.items()
        },
        "by": source.by,
        "found": dict(findings),
        "pairs": len(made),
        "prompts": len({pair.better.key[1] for pair in made}),
        "left_out": len(source.images.left_out),
    }


def _print(
    console: Console,
    config: PreferConfig,
    source: ScoredSource,
    pairs: Mapping[str, list[Pair]],
    made: list[MadePair],
    findings: Mapping[str, Any],
) -> None:
    if findings.get("rules"):
        table = Table("rule", "labelled pairs it makes", "R^2 of gap and label", box=None)
        for number, row in enumerate(findings["rules"]):
            found = "too few" if row["r_squared"] is None else f"{row['r_squared']:.3f}"
            mark = " (chosen)" if number == findings["chosen"] else ""
            table.add_row(f"{row['kind']}{mark}", f"{row['pairs']:,}", found)
        console.print(table)
    gaps = [
        source.numbers(pair.better.key)[source.by] - source.numbers(pair.other.key)[source.by]
        for pair in made
    ]
    alone = len(source.prompts) - len(pairs)
    none = sum(not of_prompt for of_prompt in pairs.values())
    said = f"{len(made):,} pairs, mean gap {sum(gaps) / len(gaps):.4g}"
    if config.temperature is not None:
        sure = [sigmoid(gap / config.temperature) for gap in gaps]
        said += f", mean preference {sum(sure) / len(sure):.3f}"
    console.print(
        f"[green]Done:[/green] {said}, in {escape(str(config.output / PAIRS))}; prompts without a "
        f"pair: {alone:,} of one image, {none:,} that the rule passes over",
        soft_wrap=True,
    )
    left_out = source.images.left_out
    if left_out:
        named = "\n".join(f"  {row['name']}: {row['reason']}" for row in left_out[:_LISTED])
        console.print(
            f"Left out: {len(left_out):,}, all in {config.output / LEFT_OUT}\n{named}",
            markup=False,
            soft_wrap=True,
        )
    strength = "" if config.temperature is None else f", strength: {_STRENGTH}"
    console.print(
        f"Next: name them in a run\n  data: {{path: {config.output}{strength}}}",
        markup=False,
        soft_wrap=True,
    )
