"""Previews: what the policy makes of the same prompts as it trains, in `previews/` of the run.

The files of a step are written one after another, each whole, before the checkpoint of that step;
so a run that goes on from a checkpoint finds all that came before, makes the rest again, and ends
with the same strip.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from rich.markup import escape

from diffalign import world
from diffalign.config import MAY_CHANGE
from diffalign.errors import DataError
from diffalign.files import read_json, write_atomically, write_image, write_json
from diffalign.imaging.grid import PAPER, GridCell, GridRow, evenly_spaced_with_ends, render_grid
from diffalign.imaging.image_files import read_image
from diffalign.imaging.response_grid import Passage, Response, ResponseRow, render_responses
from diffalign.models.sharding import is_shared_out
from diffalign.pages.environment import SHOWS_FILES, render
from diffalign.training.hooks.base import AbstractHook, StepOutcome, TrainingRun, inspecting
from diffalign.training.hooks.preview_makers import AbstractMaker, PreviewItem
from diffalign.training.hooks.preview_trackers import send_previews

FOLDER, STRIP, PAGE = "previews", "strip.png", "index.html"
_SUBJECTS = "previews.json"


@dataclass(frozen=True, kw_only=True)
class PreviewQuestion:
    """What a model that writes responses is asked."""

    text: str
    image: Path | None = field(default=None, metadata=MAY_CHANGE)
    """The image that the question is about; null for text alone."""


@dataclass(frozen=True, kw_only=True)
class PreviewsConfig:
    """What is made of the policy as it trains, for people to look at. It costs the time of its
    sampling; the weights are those of a run without previews."""

    every: int = field(default=100, metadata=MAY_CHANGE)
    """Optimiser steps between previews; there is one before the first step, and one after the
    last."""
    prompts: tuple[str, ...] = field(default=(), metadata=MAY_CHANGE)
    """Of a model that makes images; none takes captions of the training data."""
    questions: tuple[PreviewQuestion, ...] = field(default=(), metadata=MAY_CHANGE)
    """Of a model that writes responses; none takes conversations of the training data."""
    count: int = field(default=4, metadata=MAY_CHANGE)
    """How many prompts or conversations are taken from the data, where none are given."""
    seed: int = field(default=0, metadata=MAY_CHANGE)
    """Of the noise of images: prompt and seed decide it, at every step and in every run alike."""
    steps: int = field(default=20, metadata=MAY_CHANGE)
    """Denoising steps of an image, by the model's own scheduler."""
    guidance: float = field(default=5.0, metadata=MAY_CHANGE)
    """Classifier-free guidance scale of images; 1 or less is none."""
    max_new_tokens: int = field(default=64, metadata=MAY_CHANGE)
    """A response, always of the most probable tokens, ends there at the latest."""
    columns: int = field(default=8, metadata=MAY_CHANGE)
    """How many of the steps `strip.png` shows, from the first one to the last; the page shows
    all."""

    def __post_init__(self) -> None:
        for name in ("every", "count", "steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.columns < 2:
            raise ValueError(f"columns must be at least 2, got {self.columns}")

    def shaping(self) -> dict[str, object]:
        """The settings that change what a preview shows."""
        shaping = {k: v for k, v in asdict(self).items() if k not in ("every", "columns")}
        shaping["questions"] = [[q.text, str(q.image)] for q in self.questions]
        shaping["prompts"] = list(self.prompts)
        return shaping


class Previews(AbstractHook):
    """Images or responses to fixed prompts as files, strip, page and for trackers, by the main
    rank; of a network that is shared out all ranks make them, and it alone writes."""

    def __init__(self, config: PreviewsConfig, maker: AbstractMaker) -> None:
        self._config, self._maker = config, maker
        self._previewed: list[PreviewItem] = []

    def start(self, run: TrainingRun) -> Mapping[str, float]:
        if not (world.is_main() or is_shared_out(run.model.network)):
            return {}
        self._previewed = self._maker.previewed(run)
        if not self._previewed:
            run.console.print(
                "[yellow]There are no previews, as the data offers no prompts for them: give "
                "previews.prompts, or previews.questions for responses",
                soft_wrap=True,
            )
            return {}
        if world.is_main():
            self._forget(run)
        if run.step == 0:
            self._preview(run)
        return {}

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        due = outcome.complete or run.step % self._config.every == 0
        if due and self._previewed:
            self._preview(run)
        return {}

    def _forget(self, run: TrainingRun) -> None:
        """Remove previews of steps that are done again, and those of other prompts or settings."""
        folder = run.output / FOLDER
        made_of = {
            "captions": [item.caption for item in self._previewed],
            "settings": self._config.shaping(),
        }
        written = folder / _SUBJECTS
        try:
            same = run.step > 0 and written.is_file() and read_json(written) == made_of
        except DataError:
            same = False
        if not same:
            if run.step and folder.exists():
                run.console.print(
                    f"[yellow]{escape(str(folder))} has previews of other prompts or settings: "
                    f"they are made anew from step {run.step} on",
                    soft_wrap=True,
                )
            shutil.rmtree(folder, ignore_errors=True)
            write_json(written, made_of)
            return
        for step in _steps(folder):
            if step > run.step:
                for frame in folder.glob(f"{_name(step)}-*"):
                    frame.unlink()

    def _preview(self, run: TrainingRun) -> None:
        with inspecting(run):
            made = self._maker.make(run, self._previewed)
        if not world.is_main():
            return
        folder = run.output / FOLDER
        try:
            for number, frame in enumerate(made):
                place = folder / f"{_name(run.step)}-{number}"
                if isinstance(frame, str):
                    write_atomically(place.with_suffix(".txt"), frame)
                else:
                    write_image(place.with_suffix(".png"), frame)
            self._show(folder, run.step)
        except OSError as error:  # as with a checkpoint: room may be made, and the run goes on
            run.console.print(
                f"[red]{escape(str(folder))}: the previews of step {run.step} could not be "
                f"written ({error}). The run goes on",
                soft_wrap=True,
            )
        send_previews(
            run.accelerator.trackers, [s.caption for s in self._previewed], made, step=run.step
        )

    def _show(self, folder: Path, last: int) -> None:
        """Strip and page of all steps up to the last."""
        steps = [step for step in _steps(folder) if step <= last]
        frames = {step: _frames(folder, step, len(self._previewed)) for step in steps}
        steps = [step for step in steps if None not in frames[step]]
        shown = evenly_spaced_with_ends(steps, self._config.columns)
        rows = [[frames[step][i] for step in shown] for i in range(len(self._previewed))]
        write_image(folder / STRIP, _strip(self._previewed, rows, shown))
        for number, item in enumerate(self._previewed):
            for image in item.images[:1]:
                write_image(folder / f"question-{number}.png", image)
        everything = [[frames[step][i] for step in steps] for i in range(len(self._previewed))]
        write_atomically(folder / PAGE, _page(self._previewed, everything, steps))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Steps of which there are previews, in order."""
    found = {frame.name.split("-")[1] for frame in folder.glob("step-*-*")}
    return sorted(int(number) for number in found if number.isdecimal())


def _frames(folder: Path, step: int, count: int) -> list[Path | None]:
    """The files of a step by prompt; None where one is missing."""
    frames: list[Path | None] = []
    for number in range(count):
        place = folder / f"{_name(step)}-{number}"
        kinds = (place.with_suffix(suffix) for suffix in (".png", ".txt"))
        frames.append(next((file for file in kinds if file.is_file()), None))
    return frames


def _page(
    previewed: Sequence[PreviewItem], rows: Sequence[Sequence[Path | None]], steps: Sequence[int]
) -> str:
    """HTML that shows files of its own folder, and needs nothing else: every prompt, and what the
    policy made of it at every step."""
    return render(
        "previews.html",
        title="Previews",
        allow=SHOWS_FILES,
        columns=[f"step {step:,}" if step else "start" for step in steps],
        rows=[
            {
                "caption": item.caption,
                "question": f"question-{number}.png" if item.images else "",
                "frames": [_frame(file) for file in row],
            }
            for number, (item, row) in enumerate(zip(previewed, rows, strict=True))
        ],
    )


def _frame(file: Path | None) -> Mapping[str, str]:
    """What the page shows of a file: its name as an image's, or its text."""
    if file is None:
        return {"image": "", "text": ""}
    if file.suffix == ".txt":
        return {"image": "", "text": file.read_text(encoding="utf-8")}
    return {"image": file.name, "text": ""}


def _strip(
    previewed: Sequence[PreviewItem], rows: Sequence[Sequence[Path | None]], steps: Sequence[int]
) -> Image.Image:
    """One image: prompts from top to bottom, steps from left to right."""
    titles = [f"step {step:,}" if step else "start" for step in steps]
    if all(frame is not None and frame.suffix == ".png" for row in rows for frame in row):
        return render_grid(
            [
                GridRow(
                    caption=item.caption,
                    cells=[GridCell(image=read_image(frame)) for frame in row if frame],
                )
                for item, row in zip(previewed, rows, strict=True)
            ],
            titles,
        )
    return render_responses(
        [
            ResponseRow(
                image=item.images[0] if item.images else Image.new("RGB", (8, 8), PAPER),
                responses=[
                    Response(passages=[Passage(text=frame.read_text(encoding="utf-8"))])
                    for frame in row
                    if frame
                ],
            )
            for item, row in zip(previewed, rows, strict=True)
        ],
        titles,
    )
