"""`diffalign check`: what is wrong with a data set, before anybody trains on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape

from diffalign import commands, components
from diffalign import config as configs
from diffalign.checking.checks.base import AbstractCheck
from diffalign.checking.reading import (
    AbstractCheckedData,
    CheckedPairs,
    CheckedResponses,
    read_all,
)
from diffalign.checking.report import FailOn, Report, as_json, print_report, write_page
from diffalign.checking.rows import Examined, Kind, OtherData, key_of, plain_text
from diffalign.console import progress
from diffalign.data.held_out import is_held_out
from diffalign.data.location import locate, other_splits
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs, open_data
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.images import looks_like_images
from diffalign.data.responses.reading import open_responses
from diffalign.data.rows import AbstractRowStream
from diffalign.data.strength.settings import StrengthConfig
from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.files import write_json
from diffalign.generation.prompts import read_prompts
from diffalign.processes import only_writer
from diffalign.ranges import AtLeast, Between, Ranged

_SECTIONS: tuple[Literal["data", "responses"], ...] = ("data", "responses")
SMALLEST_RESOLUTION = 8
"""Of a data section that no training config gives: the least, so that no image is smaller."""
_LOOKED_AT = 20
"""Pairs whose images are looked at to tell images from texts."""
_FIRST = ("rows", "images")
"""Checks that a reader wants to see before the others."""
_PROMPT_FILES = (".txt", ".tsv", ".csv")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Ranged):
    """Which data is checked, for what, and what becomes of it.

    `diffalign check DATA` takes a path or a hub id, and finds out by itself whether it holds image
    pairs or responses; or the config of a training run, of which it takes `data` or `responses`.
    """

    data: PairConfig | None = None
    """Pairs of images, or preferred images alone."""
    responses: ResponseConfig | None = None
    """Preferences between responses."""
    against: tuple[str, ...] = ()
    """Data that must share no prompt with it, such as that of an evaluation: paths or hub ids of
    the same kind of data, or files of prompts (.txt, .tsv, .csv). Other splits in the same folder
    are compared in any case, and so is what `data.holdout` keeps back."""
    images: Literal["all", "sample", "none"] = "sample"
    """Which images are decoded, for perceptual hashes and to find damage within files. Of the
    others header, end and bytes are read. `none` decodes those alone whose end is missing."""
    sample: Annotated[int, AtLeast(1)] = 4000
    """Images that `images: sample` decodes, about; smaller data sets are decoded whole."""
    checks: tuple[AbstractCheck, ...] = ()
    """Checks with other settings than their own, each `{kind: position, tolerance: 0.05}`; or of
    your own. All other kinds are made with their defaults."""
    without: tuple[str, ...] = ()
    """Kinds of checks that are left out."""
    fail_on: FailOn = "any"
    """Findings at which the command ends with 1: `any`, `harmful` ones alone, or `never`."""
    confidence: Annotated[float, Between(0, 1, without=[0, 1])] = 0.95
    """Of the intervals that decide about shares."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Look only at the first so many rows."""
    examples: Annotated[int, AtLeast(0)] = 6
    """Of each finding on the page."""
    listed: Annotated[int, AtLeast(0)] = 1000
    """Rows of each finding in the JSON file."""
    workers: Annotated[int, AtLeast(0)] = 2
    """Processes that read; 0 reads in this one. Row groups of parquet and shards are shared out."""
    output: Path = Path("runs/check")
    """Folder for `check.json`, `report.html` and `check.yaml`; what an earlier check wrote there is
    replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (self.responses is None):
            raise ValueError(
                "give data or responses: a check looks at pairs of images or at responses"
            )
        known = components.kinds(AbstractCheck)
        for name in self.without:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"without names {name!r} (checks: {', '.join(known)}).{hint}")

    def chosen(self, kind: Kind) -> dict[str, AbstractCheck]:
        """The checks for a kind of data, by name."""
        given = {components.kind_of(check): check for check in self.checks}
        found = {
            name: given.get(name) or components.find(AbstractCheck, name)()  # type: ignore[type-abstract]
            for name in [*_FIRST, *components.kinds(AbstractCheck), *given]
        }
        return {
            name: check
            for name, check in found.items()
            if name not in self.without and kind in check.of
        }


def load(data: str | None, overrides: Sequence[str] = ()) -> CheckConfig:
    """The config for a path, a hub id, or a config file of a training run or of a check.

    Args:
        data: as the first argument of the command line; None where overrides name the data.
        overrides: `key.path=value`.

    Raises:
        ConfigError: nothing to check is named, or a setting is not allowed.
        DataError: what is there is neither image pairs nor responses.
    """
    if data is not None and Path(data).suffix.lower() in (".yaml", ".yml"):
        return _of_file(Path(data), overrides)
    tree = configs.tree(None, overrides)
    if data is not None:
        named = next((name for name in _SECTIONS if name in tree), None)
        section = named or section_of(data)
        tree[section] = {"path": data, **(tree.get(section) or {})}
    if not set(_SECTIONS) & set(tree):
        raise ConfigError(
            "check needs a data set or the config of a training run, for example "
            "diffalign check pairs/ or diffalign check configs/diffusion_dpo/sdxl.yaml"
        )
    if isinstance(tree.get("data"), dict):
        tree["data"].setdefault("resolution", SMALLEST_RESOLUTION)
    return configs.from_dict(CheckConfig, tree, place=configs.COMMAND_LINE)


def _of_file(path: Path, overrides: Sequence[str]) -> CheckConfig:
    """Of a saved check, or of the sections of a training run that name data."""
    tree = configs.tree(path, overrides)
    if set(configs.tree(path)) <= {f.name for f in dataclasses.fields(CheckConfig)}:
        return configs.from_dict(CheckConfig, tree, place=str(path))
    named = {override.partition("=")[0].partition(".")[0] for override in overrides}
    kept = {key: tree[key] for key in tree if key in {*_SECTIONS, *named} and tree[key] is not None}
    if not set(_SECTIONS) & set(kept):
        raise ConfigError(
            f"{path}: has neither data nor responses: a run that samples everything itself has no "
            f"data to check"
        )
    return configs.from_dict(CheckConfig, kept, place=str(path))


def section_of(path: str) -> Literal["data", "responses"]:
    """Whether a path holds image pairs or responses, by its columns and first values."""
    pairs = PairConfig(path=path, resolution=SMALLEST_RESOLUTION)
    location = locate(pairs)
    if location.root is None and not location.stored:  # on the hub, of which nothing is kept yet
        pairs = dataclasses.replace(pairs, streaming=True)
    why = {}
    try:
        opened = open_data(_quickly(pairs))
        if _holds_images(opened):
            return "data"
        why["image pairs"] = "its two sides hold texts"
    except (DataError, ConfigError) as error:
        why["image pairs"] = str(error)
    try:
        open_responses(ResponseConfig(path=path))
        return "responses"
    except (DataError, ConfigError) as error:
        why["responses"] = str(error)
    listed = "".join(f"\n- as {kind}: {said}" for kind, said in why.items())
    raise DataError(
        f"{path} can be read neither as image pairs nor as responses; settings under data or "
        f"responses, such as data.columns or responses.kind, may help:{listed}"
    )


def _holds_images(opened: OpenedPairs) -> bool:
    """Whether the sides of the first rows are images, as far as can be told."""
    columns, rows = opened.columns, opened.rows
    numbered: Iterator[Any] = (
        rows.all_rows()
        if isinstance(rows, AbstractRowStream)
        else (rows[number] for number in range(min(len(rows), _LOOKED_AT)))
    )
    told = []
    for _, row in zip(range(_LOOKED_AT), numbered, strict=False):
        values = [row.values.get(name) for name in columns.images]
        told += [
            isinstance(value, Path) or looks_like_images(value) or bool(_there(value, row.folder))
            for value in values
            if value is not None
        ]
    return not told or any(told)


def _there(value: Any, folder: Path | None) -> bool:
    if not isinstance(value, str) or len(value) > 255 or "\n" in value:
        return False
    return (Path(value) if folder is None else folder / value).is_file()


def _quickly(config: PairConfig) -> PairConfig:
    """The same data, parquet read in order in place of a copy, and every row as its label has it,
    whatever a run makes of ties and numbers."""
    location = locate(config)
    parquet = location.form == "table" and (
        bool(location.stored) or any(file.suffix.lower() == ".parquet" for file in location.files)
    )
    return dataclasses.replace(
        config,
        streaming=config.streaming or parquet,
        buckets=False,
        holdout=None,
        ties="drop",
        weighting="uniform",
        strength=StrengthConfig(),
    )


def run(config: CheckConfig, *, as_json_only: bool = False) -> Report:
    """Check, print, and write `check.json`, `report.html` and `check.yaml`.

    Args:
        config: what to check.
        as_json_only: print one JSON object, and nothing else on standard output.

    Raises:
        BusyError: another process checks into the same folder.
    """
    console = Console(highlight=False, stderr=as_json_only)
    with only_writer(config.output, of="check"):
        return _run(config, console, as_json_only=as_json_only)


def _run(config: CheckConfig, console: Console, *, as_json_only: bool) -> Report:
    kind: Kind = "images" if config.data is not None else "responses"
    checks = config.chosen(kind)
    data = _opened(config, checks)
    console.print(f"[bold]check[/bold]  {escape(data.summary)}", soft_wrap=True)
    examined = _examined(config, data, console)
    report = Report(
        data=examined,
        outcomes={name: check.look(examined) for name, check in checks.items()},
        titles={name: check.title for name, check in checks.items()},
    )
    plain = as_json(report, listed=config.listed)
    if as_json_only:
        print(json.dumps(plain, ensure_ascii=False))
    else:
        print_report(report, console)
    page = _write(config, data, report, plain)
    console.print(f"[green]Done:[/green] {escape(str(page))}", soft_wrap=True)
    if report.findings:
        console.print(
            f"Next: open {page} in a browser; rows by name are in {config.output / 'check.json'}",
            markup=False,
            soft_wrap=True,
        )
    return report


def _opened(config: CheckConfig, checks: Mapping[str, AbstractCheck]) -> AbstractCheckedData:
    def wanted(column: str) -> bool:
        return any(check.reads(column) for check in checks.values())

    data: CheckedPairs | CheckedResponses
    if config.data is not None:
        opened = open_data(_quickly(config.data), along=wanted)
        data = CheckedPairs(
            data=opened, max_pixels=config.data.max_pixels, along=opened.columns.along
        )
    else:
        assert config.responses is not None
        responses = open_responses(config.responses)
        heavy = responses.mapping.heavy_columns()
        along = tuple(n for n in responses.columns if n not in heavy and wanted(n))
        data = CheckedResponses(data=responses, max_pixels=config.responses.max_pixels, along=along)
    shares = {"all": data.share_of(2**62), "none": data.pixels}
    pixels = shares.get(config.images) or data.share_of(config.sample)
    return dataclasses.replace(data, pixels=pixels)


def _examined(config: CheckConfig, data: AbstractCheckedData, console: Console) -> Examined:
    limit = config.limit
    section = config.data or config.responses
    assert section is not None
    if section.limit is not None:
        limit = section.limit if limit is None else min(limit, section.limit)
    count = data.count
    total = (limit or 0) if count is None else min(count, limit or count)
    with progress(console, "reading", total, unit="rows") as advance:
        rows, looks = read_all(data, workers=config.workers, limit=limit, advance=advance)
    if not rows:
        raise DataError(f"{data.summary}: there is no row in it")
    pairs = data.data if isinstance(data, CheckedPairs) else None
    examined = Examined(
        kind=data.kind,
        summary=data.summary,
        rows=rows,
        grouped=isinstance(data, CheckedPairs) and data.grouped,
        noun="comparisons" if isinstance(data, CheckedPairs) and data.grouped else "rows",
        looks=looks,
        resolution=None if config.data is None else config.data.resolution,
        scores_are_votes=pairs is not None
        and all("vote" in name.lower() for name in pairs.columns.scores or ("none",)),
        confidence=config.confidence,
    )
    decoded = "none, but those whose end is missing"
    if looks:
        decoded = f"{len(looks):,} of {len(examined.seen):,} different files"
    others = [*_other_data(config), *_held_out(config, examined)]
    return dataclasses.replace(examined, decoded=decoded, others=others)


def _other_data(config: CheckConfig) -> Iterator[OtherData]:
    """Other splits of the same folder, and what `against` names."""
    section = config.data or config.responses
    assert section is not None
    for split in other_splits(section):
        other = dataclasses.replace(section, split=split, limit=None)
        yield OtherData(name=f"the split {split}", keys=_keys(other))
    for name in config.against:
        if Path(name).suffix.lower() in _PROMPT_FILES:
            prompts = read_prompts(Path(name))
            keys = frozenset[str | bytes](plain_text(prompt.text) for prompt in prompts)
        else:
            keys = _keys(dataclasses.replace(section, path=name, limit=None))
        yield OtherData(name=name, keys=keys)


def _keys(section: PairConfig | ResponseConfig) -> frozenset[str | bytes]:
    """What the rows of another data set of the same form are about."""
    if isinstance(section, PairConfig):
        pairs = CheckedPairs(data=open_data(_quickly(section)), max_pixels=section.max_pixels)
        return frozenset(text for prompt in pairs.prompts() if (text := plain_text(prompt)))
    responses = CheckedResponses(data=open_responses(section), max_pixels=section.max_pixels)
    rows, _ = read_all(responses, workers=0)
    return frozenset(key for row in rows if (key := key_of(row)) is not None)


def _held_out(config: CheckConfig, data: Examined) -> Iterator[OtherData]:
    """The rows that `data.holdout` keeps back, which a digest of the very prompt decides: another
    spelling of it may be trained on. Responses are held out by their images."""
    share = None if config.data is None else config.data.holdout
    if share is None:
        return
    own = frozenset(number for number, row in data.pairs if is_held_out(row.prompt, share))
    keys = frozenset(key for number in own if (key := data.keys[number]) is not None)
    yield OtherData(name="data.holdout", keys=keys, own=own)


def _write(
    config: CheckConfig, data: AbstractCheckedData, report: Report, plain: Mapping[str, Any]
) -> Path:
    """Write everything; the page is what a person opens."""
    config.output.mkdir(parents=True, exist_ok=True)
    page, saved = config.output / "report.html", config.output / "check.yaml"
    configs.save(config, saved)
    write_json(config.output / "check.json", plain)
    checks = config.chosen(data.kind)
    settings = {
        f"{name}.{field.name}": getattr(check, field.name)
        for name, check in checks.items()
        for field in dataclasses.fields(check)
    }
    write_page(
        report,
        page,
        again=data.read_again,
        texts=data.texts if isinstance(data, CheckedResponses) else None,
        examples=config.examples,
        max_pixels=data.max_pixels,
        settings={
            "images decoded": report.data.decoded,
            "confidence of intervals": config.confidence,
            **{name: "null" if value is None else value for name, value in settings.items()},
        },
        repeated_by=commands.command("check", config=saved),
    )
    return page
