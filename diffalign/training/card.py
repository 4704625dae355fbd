"""The model card of a run: what was done to which model, with which data, settings and result.

What a user typed (names, paths, prompts) reaches the card as text: it cannot end a line, a table, a
block or the metadata.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from diffalign import __version__, components, config, world
from diffalign.errors import DataError
from diffalign.files import read_json, read_json_lines, write_atomically
from diffalign.models.base import AbstractModel
from diffalign.training.config import RunConfig
from diffalign.training.describe import plan

CARD = "README.md"
GRID = "grid.png"
"""What the image of a comparison is called next to the card."""

LICENSES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "llava-hf/llava-1.5-7b-hf": "llama2",
    "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0",
}
"""Licences of the bases that our configs name, as their pages on the hub say; of others the card
that lies next to the weights is read."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Evaluation:
    """A figure of the trained model with its interval."""

    task: str
    """Kind of the data, such as `prompts`, or the benchmark."""
    data: str
    """What was measured on, in words."""
    metric: str
    """Identifier of the figure."""
    label: str
    """The figure in words."""
    value: float
    low: float | None
    high: float | None
    confidence: float

    @property
    def spelt(self) -> str:
        """Value and interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return (
            f"{self.value:.4g} ({self.confidence:.0%} interval {self.low:.4g} to {self.high:.4g})"
        )


def write_model_card(
    run: RunConfig,
    folder: Path,
    *,
    usage: str,
    results: Sequence[Path] = (),
    merged: bool = False,
) -> Path:
    """Write `README.md` in the hub's format, and `grid.png` next to it where there is one.

    Args:
        run: the config of the run.
        folder: where the card goes.
        usage: lines of Python that open the model.
        results: what `compare` wrote, as a file or its folder, and `evaluate --json` printed.
        merged: the card is of a whole model, an adapter of the run merged into it.

    Returns:
        The path of the card.

    Raises:
        DataError: a file of results is not one.
    """
    evaluations = [found for path in results for found in read_evaluations(path)]
    grid = _grid(run.output, results)
    if grid is not None and grid.resolve() != (folder / GRID).resolve():
        shutil.copyfile(grid, folder / GRID)
    data = _metadata(run, evaluations, merged=merged)
    body = _body(run, usage, evaluations, grid=grid is not None)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)
    path = folder / CARD
    write_atomically(path, str(card))
    return path


def write_cards(run: RunConfig, results: Sequence[Path]) -> list[Path]:
    """The cards of a finished run: of its folder, and of `final`, which is ready for the hub.

    Args:
        run: its config.
        results: see `write_model_card`.
    """
    return [
        write_model_card(run, run.output, usage=run.model.usage("final"), results=results),
        write_model_card(
            run, run.output / "final", usage=run.model.usage("USER/NAME"), results=results
        ),
    ]


def results_of(run: Path) -> list[Path]:
    """Comparisons that lie in the folder of a run, or in one of its folders."""
    return [
        path
        for path in sorted([run / "compare.json", *run.glob("*/compare.json")])
        if path.is_file()
    ]


_NOT_RESULTS = (DataError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


def read_evaluations(path: Path) -> list[Evaluation]:
    """What `compare` wrote as `compare.json`, or `evaluate --json` printed.

    Args:
        path: the file, or the folder of a comparison.

    Raises:
        DataError: it is neither.
    """
    path = _file_of(path)
    try:
        content = read_json(path)
        if "comparisons" in content:
            return list(_of_comparison(content))
        return list(_of_benchmark(content))
    except _NOT_RESULTS as error:
        raise DataError(
            f"{path}: holds no results: give the compare.json of `diffalign compare`, or what "
            f"`diffalign evaluate KIND ... --json` printed ({type(error).__name__}: {error})"
        ) from error


def _file_of(path: Path) -> Path:
    return path / "compare.json" if path.is_dir() else path


def _of_comparison(content: Mapping[str, Any]) -> Iterator[Evaluation]:
    figures = {
        "win_rate": "win rate of decided pairs",
        "win_rate_ties_half": "win rate, ties as half",
        "mean_difference": "mean difference of the score",
    }
    for row in content["comparisons"]:
        for name, label in figures.items():
            if row[name] is None:
                continue
            interval = row[f"{name}_interval"] or {}
            yield Evaluation(
                task="prompts",
                data=f"{row['items']} pairs of images, {row['prompts']} prompts",
                metric=name,
                label=f"{label}: {row['model']} against {row['baseline']}, by {row['scorer']}",
                value=float(row[name]),
                low=interval.get("low"),
                high=interval.get("high"),
                confidence=float(row["confidence"]),
            )


def _of_benchmark(content: Mapping[str, Any]) -> Iterator[Evaluation]:
    for name, interval in content["intervals"].items():
        if content[name] is None:
            continue
        yield Evaluation(
            task=str(content["benchmark"]),
            data=str(content["benchmark"]).upper(),
            metric=name,
            label=name.replace("_", " "),
            value=float(content[name]),
            low=interval and interval["low"],
            high=interval and interval["high"],
            confidence=float(content["confidence"]),
        )


def _grid(run: Path, results: Sequence[Path]) -> Path | None:
    """The image that shows the result best: of a comparison, else one seed over the rounds."""
    found = [_file_of(path).with_name("comparison.png") for path in results]
    found.append(run / "rounds/preview_strip.png")
    return next((path for path in found if path.is_file()), None)


def _metadata(run: RunConfig, evaluations: Sequence[Evaluation], *, merged: bool) -> ModelCardData:
    adapter = run.model.trains_adapter and not merged
    base = base_on_hub(run.model)
    task = run.model.task
    measured = [
        EvalResult(
            task_type=task or "other",
            dataset_type=_plain(found.task),
            dataset_name=_plain(found.data),
            metric_type=found.metric,
            metric_value=found.value,
            metric_name=_plain(found.label),
            metric_args={
                "low": found.low,
                "high": found.high,
                "confidence": found.confidence,
            },
        )
        for found in evaluations
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=base and ("adapter" if adapter else "finetune"),
        library_name=run.model.whole_library if merged else run.model.library,
        license=_license(run.model, base),
        datasets=_datasets(run) or None,
        pipeline_tag=task,
        tags=[
            "diffalign",
            "preference-optimization",
            components.kind_of(run.objective).rpartition(".")[2],
            *["lora"] * adapter,
        ],
        model_name=_plain(run.output.resolve().name) if measured else None,
        eval_results=measured or None,
    )


def base_on_hub(model: AbstractModel) -> str | None:
    """The hub id of the model that training began with; None where it lies on this disk alone."""
    path = getattr(model, "unet", None) or getattr(model, "path", None)
    return path if isinstance(path, str) and _is_hub_id(path) else None


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not Path(path).exists()


def _datasets(run: RunConfig) -> list[str]:
    paths = [section.path for section in (run.data, run.responses) if section is not None]
    return [str(path) for path in paths if _is_hub_id(str(path))]


def _license(model: AbstractModel, base: str | None) -> str | None:
    """That of the base, where its card lies on this disk or our configs name it."""
    if base is None:
        card = Path(str(getattr(model, "path", ""))).expanduser() / CARD
    else:
        cached = try_to_load_from_cache(base, CARD, revision=getattr(model, "revision", None))
        card = Path(cached) if isinstance(cached, str) else Path()
    if card.is_file():
        try:
            found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        except (OSError, ValueError, yaml.YAMLError):
            found = None
        if isinstance(found, str) and re.fullmatch(r"[\w.+-]+", found):
            return found
    return LICENSES.get(base or "")


def _body(run: RunConfig, usage: str, evaluations: Sequence[Evaluation], *, grid: bool) -> str:
    settings = [
        f"- **{head}**: {_escaped(_without_paths(text, run))}"
        for head, text in plan(run, world.size())
    ]
    parts = [
        f"# {_escaped(run.output.resolve().name)}",
        f"Aligned with preferences by diffalign {__version__}.",
        "\n".join(settings),
        f"## Use\n\n{_fenced(_without_paths(usage, run), 'python')}",
    ]
    if note := run.model.export_note:
        parts.append(note)
    if grid:
        parts.append(f"## Images\n\n![Base and aligned model, same prompts and noise]({GRID})")
    if evaluations:
        rows = [f"| {_escaped(v.label)} | {_escaped(v.data)} | {v.spelt} |" for v in evaluations]
        parts.append(
            "\n".join(["## Results", "", "| figure | of | value |", "|---|---|---|", *rows])
        )
    if last := _last_figures(run.output / "metrics.jsonl"):
        rows = [f"| {_escaped(name)} | {value:.6g} |" for name, value in last.items()]
        parts.append(
            "\n".join(["## Last figures of training", "", "| figure | value |", "|---|---|", *rows])
        )
    settled = _published(config.to_dict(run))
    resolved = yaml.safe_dump(settled, sort_keys=False, allow_unicode=True)
    parts.append(f"## Config\n\n{_fenced(resolved, 'yaml')}")
    return "\n\n".join(parts) + "\n"


def _last_figures(metrics: Path) -> Mapping[str, float]:
    rows = read_json_lines(metrics) if metrics.is_file() else []
    return {
        name: value
        for name, value in (rows[-1] if rows else {}).items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _plain(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _escaped(text: str) -> str:
    """Text that Markdown, and a table of it, shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#&$!])", r"\\\1", _plain(text))


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _paths(value: Any) -> Iterator[str]:
    """All absolute paths of a config."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and value != _published(value):
        yield value


def _published(value: Any) -> Any:
    """A card is published: of absolute paths on this disk it has the last part of the name."""
    if isinstance(value, Mapping):
        return {key: _published(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_published(item) for item in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value


def _without_paths(text: str, run: RunConfig) -> str:
    """The same for paths within a text."""
    for path in sorted(set(_paths(config.to_dict(run))), key=len, reverse=True):
        for spelt in dict.fromkeys((path, json.dumps(path)[1:-1])):
            text = text.replace(spelt, _published(path))
    return text
