"""One seed over the rounds: the same prompts and noise, sampled by every round's policy."""

from __future__ import annotations

import abc
import shutil
from pathlib import Path

from diffalign.files import read_json, write_atomically, write_image, write_json, writing
from diffalign.imaging.grid import GridCell, GridRow, render_grid
from diffalign.imaging.image_files import encode_png, read_image
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.parsing import checked
from diffalign.rollouts.base import AbstractCollector, AbstractPreview
from diffalign.rollouts.sampler import sample
from diffalign.seeding import derive_seed

_EVERY_ROUND = 8
"""Up to here every round is sampled; later ones where their number is a power of two, so that a run
of thousands of rounds costs no more to watch than one of twenty."""


class AbstractImageCollector(AbstractCollector):
    """Phases of rounds of images, which a strip shows."""

    @abc.abstractmethod
    def preview_prompts(self) -> list[str]:
        """A few prompts that every round samples from the same noise."""

    @abc.abstractmethod
    def preview_process(self) -> ReverseProcess:
        """How they are sampled."""

    def preview(self, folder: Path, run_seed: int) -> AbstractPreview | None:
        return PreviewStrip(folder, self, run_seed=run_seed)

    def captions(self, n: int) -> list[str]:
        return self.preview_prompts()[:n]


class PreviewStrip(AbstractPreview):
    """Renders `preview_strip.png`: prompts down, rounds across."""

    def __init__(self, folder: Path, collector: AbstractImageCollector, *, run_seed: int) -> None:
        """Args:
        folder: of all rounds.
        collector: names prompts and how they are sampled.
        run_seed: of the run.
        """
        self._folder = folder / "preview_strip"
        self._strip = folder / "preview_strip.png"
        self._collector = collector
        self._run_seed = run_seed

    def add(self, number: int, model: DiffusionModel, *, last: bool = False) -> None:
        if not last and number > _EVERY_ROUND and number & (number - 1):
            return
        prompts = self._prompts()
        if prompts:
            self._generate(number, prompts, model)
            self._render(number, prompts)

    def forget(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._strip.unlink(missing_ok=True)

    def _generate(self, number: int, prompts: list[str], model: DiffusionModel) -> None:
        seeds = [derive_seed(self._run_seed, "film", i) for i in range(len(prompts))]
        sampled = sample(
            model,
            self._collector.preview_process(),
            prompts,
            start_seeds=seeds,
            step_seeds=lambda step: [derive_seed(seed, step) for seed in seeds],
        )
        images = model.autoencoder.decode(sampled.latents[-1]).cpu()
        with writing(self._folder):
            for frame, image in zip(self._frames(number, len(prompts)), images, strict=True):
                write_atomically(frame, encode_png(image))

    def _prompts(self) -> list[str]:
        """Decided once a run: those of the first call."""
        path = self._folder / "prompts.json"
        if not path.exists():
            with writing(path):
                write_json(path, self._collector.preview_prompts())
        return checked(list[str], read_json(path), path)

    def _frames(self, number: int, prompts: int) -> list[Path]:
        return [self._folder / f"round-{number:04d}-{i}.png" for i in range(prompts)]

    def _render(self, last: int, prompts: list[str]) -> None:
        numbers = sorted({int(frame.stem.split("-")[1]) for frame in self._folder.glob("*.png")})
        shown = [number for number in numbers if number <= last]
        rows = []
        for i, prompt in enumerate(prompts):
            frames = [self._frames(number, len(prompts))[i] for number in shown]
            cells = [GridCell(image=read_image(frame)) for frame in frames]
            rows.append(GridRow(caption=prompt, cells=cells))
        titles = [f"round {number}" if number else "start" for number in shown]
        with writing(self._strip):
            write_image(self._strip, render_grid(rows, titles))
