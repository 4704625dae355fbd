"""One page of a training run, or of several side by side: curves, health, previews, results.

write_atomically(path, page_of_runs([RunFolder.at(Path("runs/x"))], Embedded(path)))
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import yaml

from diffalign import __version__, commands, versions
from diffalign.files import read_text
from diffalign.imaging.grid import evenly_spaced_with_ends
from diffalign.imaging.image_files import data_uri, read_image
from diffalign.models.lora import ADAPTER_SHAPE
from diffalign.pages.parts import (
    Html,
    Section,
    Tile,
    command,
    fold,
    frames,
    heading,
    interval_bar,
    link,
    notes,
    page_of,
    paragraph,
    settings_list,
    sheet,
    table,
    tiles,
)
from diffalign.reports.curves import accuracies_of, curves_of, shared_curves
from diffalign.reports.results import figure_in_words, result_parts
from diffalign.reports.run_folder import RunFolder

_COLUMNS, _PROMPTS = 8, 12
"""Of the previews on the page."""
_RESULT_SHEETS = {
    "comparison.png": "prompts down, models across",
    "descriptions.png": "images down, models across; what is wrong is red",
}
"""Images next to results, and what they show."""
_PREVIEW_PIXELS, _SHEET_PIXELS = 256, 1400
_LISTED = 60
"""Figures in the table of the last ones, and differences between configs."""
_TOLD = (
    *("model.kind", "model.path", "likelihood.kind", "objective.kind", "objective.beta"),
    *("optimizer.kind", "optimizer.lr", "training.samples_per_device", "seed"),
)
"""Settings above the whole config."""
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


class AbstractSources(Protocol):
    """Where a page finds images and other pages."""

    def image(self, file: Path, side: int) -> str:
        """The address of an image, or the image as data, its longer side `side` pixels at most;
        empty where it cannot be read."""

    def page(self, file: Path) -> str:
        """The address of a file or page of a run; empty where there is none."""


@dataclass(frozen=True)
class Embedded:
    """Images within the page, links relative to it."""

    path: Path
    """Of the page."""

    def image(self, file: Path, side: int) -> str:
        try:
            return data_uri(read_image(file), side=side, form="webp", quality=82)
        except OSError:
            return ""

    def page(self, file: Path) -> str:
        try:
            return quote(Path(os.path.relpath(file, self.path.parent)).as_posix())
        except ValueError:  # on another drive
            return ""


def page_of_runs(
    runs: Sequence[RunFolder],
    sources: AbstractSources,
    *,
    above: str | Html = "",
    allow: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        runs: one, or several to be held next to each other.
        sources: of images and links.
        above, allow: see `page_of`.
    """
    lead = _lead(runs[0]) if len(runs) == 1 else ""
    title = " and ".join(run.name for run in runs)
    return page_of(title, *sections_of(runs, sources), lead=lead, above=above, allow=allow)


def sections_of(runs: Sequence[RunFolder], sources: AbstractSources) -> list[Section]:
    """Sections from top to bottom; those without content are left out."""
    several = len(runs) > 1
    found = [Section("State", *(part for run in runs for part in _state(run, several)))]
    found.append(Section("Health", *(part for run in runs for part in _health(run, several))))
    found += _of_each("Curves", [shared_curves(runs)] if several else [curves_of(runs[0])])
    found += _of_each("Previews", [_previews(run, sources, several) for run in runs])
    found += _of_each("Rounds", [_rounds(run, sources, several) for run in runs])
    found += _of_each("Results", [_results(run, sources, several) for run in runs])
    found += _of_each("Last figures", [_last_figures(runs)])
    found += _of_each("Config", [_configs(runs)])
    if not several:
        found += [
            Section("Versions", *_versions()),
            Section("What to do next", *_next(runs[0])),
        ]
    problems = [said for run in runs for said in run.problems]
    if problems:
        found.insert(0, Section("What could not be read", notes(problems)))
    return found


def _of_each(title: str, parts: Sequence[Sequence[Html]]) -> list[Section]:
    whole = [part for of_run in parts for part in of_run if part]
    return [Section(title, *whole)] if whole else []


def kind_of_run(run: RunFolder) -> str:
    """Objective, likelihood and model in a few words."""
    objective, model = run.setting("objective.kind"), run.setting("model.kind")
    source = run.setting("rollouts.kind") or ("responses" if run.writes_responses else "pairs")
    return " on ".join(str(part) for part in (objective, model) if part) + f", from {source}"


def _lead(run: RunFolder) -> str:
    return f"{kind_of_run(run)}; {run.setting('model.path') or ''}".rstrip("; ")


# --- state and health ------------------------------------------------------------------------


def _state(run: RunFolder, several: bool) -> Iterator[Html]:
    if several:
        yield heading(f"{run.name}: {kind_of_run(run)}")
    said = {
        "finished": "the result is in final/",
        "running": "this page shows the run as it was when the page was made",
        "stopped": "no process writes here, and there is no final/",
        "not started": "there are no figures yet",
    }
    steps = f" of {run.steps:,}" if run.steps is not None else ""
    shown = [Tile("State", run.status, said[run.status]), Tile("Step", f"{run.step:,}{steps}")]
    accuracies = {"held_out/accuracy": "Held-out accuracy", "accuracy": "Accuracy"}
    accuracies |= {name: f"Accuracy, {name.split('/')[0]}" for name in accuracies_of(run)}
    for name, label in accuracies.items():
        if (value := run.last(name)) is not None:
            low, high = run.last(f"{name}_low"), run.last(f"{name}_high")
            bar: str | Html = ""
            if low is not None and high is not None:
                bar = interval_bar(value, low, high)
            shown.append(Tile(label, f"{value:.1%}", bar or "of the last logging interval"))
            break
    if (loss := run.last("loss")) is not None:
        shown.append(Tile("Loss", f"{loss:.4g}", "mean of the last logging interval"))
    if run.timing:
        latest = run.timing[-1]
        speed = latest.get("samples_per_second", 0.0)
        shown.append(
            Tile("Time", _spent(latest.get("seconds", 0.0)), f"{speed:.3g} samples a second")
        )
        if memory := latest.get("peak_memory_gib"):
            shown.append(Tile("Peak memory", f"{memory:.1f} GiB", "of the main process's device"))
    yield tiles(shown)


def _spent(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _health(run: RunFolder, several: bool) -> Iterator[Html]:
    if several:
        yield heading(run.name)
    if run.verdicts:
        yield notes(
            f"Step {int(v.get('step', 0)):,}, {v.get('verdict')}: {v['says']}" for v in run.verdicts
        )
    elif run.rows:
        yield paragraph("No verdict: nothing harmful was seen in the figures so far.")
    else:
        yield paragraph("There are no figures yet.")


# --- what the policy makes -------------------------------------------------------------------


def _previews(run: RunFolder, sources: AbstractSources, several: bool) -> list[Html]:
    previews = run.previews[:_PROMPTS]
    if not previews:
        return []
    steps = sorted({step for preview in previews for step in preview.frames})
    columns = evenly_spaced_with_ends(steps, _COLUMNS)

    def frame(file: Path | None) -> Mapping[str, str]:
        if file is None:
            return {"image": "", "text": ""}
        if file.suffix == ".txt":
            return {"image": "", "text": read_text(file)}
        return {"image": sources.image(file, _PREVIEW_PIXELS), "text": ""}

    rows = [
        {
            "caption": preview.caption,
            "question": sources.image(preview.question, _PREVIEW_PIXELS)
            if preview.question
            else "",
            "frames": [frame(preview.frames.get(step)) for step in columns],
        }
        for preview in previews
    ]
    titles = [f"step {step:,}" if step else "start" for step in columns]
    found = [heading(run.name)] if several else []
    found.append(frames(titles, rows))
    if len(steps) > len(columns) or len(run.previews) > len(previews):
        all_of_them = run.path / "previews" / "index.html"
        if address := sources.page(all_of_them):
            found.append(paragraph(link(f"All {len(steps)} steps", address)))
    return found


def _rounds(run: RunFolder, sources: AbstractSources, several: bool) -> list[Html]:
    if not run.rounds:
        return []
    found = [heading(run.name)] if several else []
    strip = run.path / "rounds" / "preview_strip.png"
    if strip.is_file() and (source := sources.image(strip, _SHEET_PIXELS)):
        found.append(
            sheet(source, "the same prompts and noise, sampled by the policy of each round")
        )
    rows = [row for row in run.rows if any(name.startswith("round/") for name in row)]
    names = list(dict.fromkeys(n for row in rows for n in row if n.startswith("round/")))
    told: list[list[str | Html]] = []
    for row in rows:
        values: list[str | Html] = [figure_in_words(row[n]) if n in row else "" for n in names]
        if not told or values != told[-1][1:]:
            told.append([f"{row['step']:,.0f}", *values])
    if told:
        found.append(table(["from step", *(n.removeprefix("round/") for n in names)], told))
    for number, folder in enumerate(reversed(run.rounds)):
        grid = folder / "grid.png"
        if number < 2 and grid.is_file() and (source := sources.image(grid, _SHEET_PIXELS)):
            image = sheet(source, f"samples of {folder.name}")
            found.append(fold(f"Samples of {folder.name}", image, open=number == 0))
    return found


# --- results ---------------------------------------------------------------------------------


def _results(run: RunFolder, sources: AbstractSources, several: bool) -> list[Html]:
    found: list[Html] = []
    if best := run.best_checkpoint:
        found.append(heading("Which checkpoint to use"))
        found += [paragraph(str(said)) for said in best.get("says", [])]
        curve = run.path / "checkpoints" / "curve.png"
        if curve.is_file() and (source := sources.image(curve, 768)):
            found.append(sheet(source, "win rate over drift"))
        strip = run.path / "checkpoints" / "strip.png"
        if strip.is_file() and (source := sources.image(strip, _SHEET_PIXELS)):
            found.append(sheet(source, "prompts down, checkpoints across, from the same noise"))
    for file, content in run.results.items():
        found.append(heading(file.parent.name if file.parent != run.path else file.name))
        found += result_parts(content)
        for name, said in _RESULT_SHEETS.items():
            grid = file.with_name(name)
            if grid.is_file() and (source := sources.image(grid, _SHEET_PIXELS)):
                found.append(sheet(source, said))
        if file.with_name("manifest.jsonl").is_file() or file.with_name("report.html").is_file():
            address = sources.page(file.with_name("report.html"))
            found += [paragraph(link("All images, by prompt and difference", address))] * bool(
                address
            )
    return [heading(run.name), *found] if several and found else found


# --- figures, config, versions ---------------------------------------------------------------


def _last_figures(runs: Sequence[RunFolder]) -> list[Html]:
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    if not names:
        return []

    def cell(run: RunFolder, name: str) -> str:
        value = run.last(name)
        return "" if value is None else figure_in_words(value)

    rows = [[name, *(cell(run, name) for run in runs)] for name in names]
    return [fold(f"{len(names)} figures", table(["figure", *(run.name for run in runs)], rows))]


def _configs(runs: Sequence[RunFolder]) -> list[Html]:
    if len(runs) == 1:
        (run,) = runs
        told = {key: value for key in _TOLD if (value := run.setting(key)) is not None}
        return [
            settings_list(told) if told else Html(""),
            fold("config.yaml", command(run.config_text)) if run.config_text else Html(""),
        ]
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    other = [key for key in keys if len({str(values.get(key)) for values in flat}) > 1]
    rows = [[key, *(_spelt(values.get(key)) for values in flat)] for key in other[:_LISTED]]
    if not rows:
        return [paragraph("The configs are the same.")]
    left_out = len(other) - len(rows)
    return [
        paragraph("Settings in which they differ; all others are the same."),
        fold(
            f"{len(other)} settings",
            table(["setting", *(run.name for run in runs)], rows),
            open=len(rows) < 16,
        ),
        paragraph(f"{left_out} more settings differ.") if left_out else Html(""),
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix.removesuffix("."): values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}{name}.").items()
    }


def _spelt(value: Any) -> str:
    if isinstance(value, list):
        return yaml.safe_dump(value, default_flow_style=True, width=1e9).strip()
    return "" if value is None else str(value)


def _versions() -> list[Html]:
    told = {"diffalign": __version__, "python": platform.python_version()}
    told |= {name: versions.installed(name) or "not installed" for name in _LIBRARIES}
    said = "Of the machine that made this page, not of the one that trained, if they differ."
    return [settings_list(told), paragraph(said)]


# --- what comes next -------------------------------------------------------------------------


def _next(run: RunFolder) -> Iterator[Html]:
    """Commands, each with what it is for, by what the folder holds."""
    path, config = run.path, run.path / "config.yaml"
    if run.status == "running":
        yield _told(
            "The run goes on. Make this page again:", commands.command("report", config=path)
        )
        return
    if run.status != "finished":
        again = commands.command("train", config=config, options=["--resume"])
        yield _told("Go on from the newest checkpoint:", again)
        return
    if run.writes_responses:
        asked: dict[str, Any] = {"questions": "QUESTIONS.json", "asking.images": "FOLDER"}
        asked["model.kind"] = "vlm"
        asked["asking.saves"] = str(path / "pope.jsonl")
        asked["model.path"] = str(path / "final")
        if isinstance(lora := run.setting("model.lora"), Mapping):
            adapter = {name: lora[name] for name in ADAPTER_SHAPE if lora.get(name)}
            asked |= {"model.path": run.setting("model.path")}
            asked |= {"model.lora": {**adapter, "start": str(path)}}
        said = "Measure hallucination, and of the base likewise (docs/evaluate-vlm.md):"
        yield _told(said, commands.command("evaluate pope", asked))
    elif not run.results:
        images = path / "evaluation"
        settings = {"models.base": run.setting("model.path"), "models.aligned": path}
        settings |= {"prompts": "PROMPTS.txt", "seeds": 4, "output": images}
        yield _told(
            "Generate the same prompts and noise with base and aligned model, score and compare:",
            commands.command("generate", settings),
            commands.command("score", {"images": images, "scorer.kind": "pickscore"}),
            commands.command("compare", {"images": images}),
        )
    if len(run.checkpoints) > 1 and not run.best_checkpoint and not run.writes_responses:
        settings = {"prompts": "PROMPTS.txt", "scorer.kind": "pickscore"}
        best = commands.command("best-checkpoint", settings, config=path)
        yield _told(f"Which of the {len(run.checkpoints)} checkpoints is best:", best)
    yield _told("Write it for other programs:", commands.command("export", config=path))
    if run.verdicts:
        yield paragraph("Read the verdicts above first: docs/health.md says what to change.")


def _told(said: str, *lines: str) -> Html:
    return Html(paragraph(said) + command("\n".join(lines)))
