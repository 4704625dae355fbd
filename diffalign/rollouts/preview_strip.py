"""One seed over the rounds: the same prompts and noise, sampled by every round's policy."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffalign.files import read_json, write_atomically, write_image, write_json, writing
from diffalign.imaging.grid import GridCell, GridRow, render_grid
from diffalign.imaging.image_files import encode_png, read_image
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.parsing import checked
from diffalign.rollouts.base import AbstractCollector
from diffalign.rollouts.sampler import sample
from diffalign.seeding import derive_seed

_EVERY_ROUND = 8
"""Up to here every round is sampled; later ones where their number is a power of two, so that a run
of thousands of rounds costs no more to watch than one of twenty."""


class PreviewStrip:
    """Renders `preview_strip.png`: prompts down, rounds across."""

    def __init__(self, folder: Path, collector: AbstractCollector, *, run_seed: int) -> None:
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
        """Sample what the policy at the start of round `number` makes of the prompts.

        Args:
            number: of the round; of the one that would follow, when the run is over.
            model: with that policy.
            last: sample it whatever its number.
        """
        if not last and number > _EVERY_ROUND and number & (number - 1):
            return
        prompts = self._prompts()
        if prompts:
            self._generate(number, prompts, model)
            self._render(number, prompts)

    def forget(self) -> None:
        """Remove what an earlier run left in the same folder."""
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
