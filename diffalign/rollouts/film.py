"""One seed over the rounds: the same prompts from the same noise, drawn by every round's policy."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from diffalign.evaluation.generation import encode_png
from diffalign.evaluation.grid import GridCell, GridRow, draw_grid
from diffalign.evaluation.manifest import write_atomically
from diffalign.models.denoiser import DiffusionModel
from diffalign.rollouts.base import AbstractCollector
from diffalign.rollouts.sampler import sample
from diffalign.rollouts.store import writing
from diffalign.seeding import derive_seed

_MOST_FRAMES = 8
"""Columns of the strip; of more rounds, evenly spaced ones are shown."""


class FilmStrip:
    """Draws `film_strip.png`: prompts down, rounds across."""

    def __init__(self, folder: Path, collector: AbstractCollector, *, run_seed: int) -> None:
        """Args:
        folder: of all rounds.
        collector: names prompts and how they are drawn.
        run_seed: of the run.
        """
        self._folder = folder / "film"
        self._strip = folder / "film_strip.png"
        self._collector = collector
        self._run_seed = run_seed

    def add(self, number: int, model: DiffusionModel) -> None:
        """Draw what the policy at the start of round `number` makes of the prompts."""
        prompts = self._prompts()
        frames = self._frames(number, len(prompts))
        if prompts and not all(frame.exists() for frame in frames):
            process = self._collector.preview_process()
            seeds = [derive_seed(self._run_seed, "film", i) for i in range(len(prompts))]
            with model.sampling():
                drawn = sample(
                    model,
                    process,
                    prompts,
                    start_seeds=seeds,
                    step_seeds=lambda step: [derive_seed(seed, step) for seed in seeds],
                )
                pictures = model.decode_images(drawn.latents[-1]).cpu()
            with writing(self._folder):
                for frame, picture in zip(frames, pictures, strict=True):
                    write_atomically(frame, encode_png(picture))
        self._draw(prompts, number)

    def _prompts(self) -> list[str]:
        """Decided once a run: those of the first call."""
        path = self._folder / "prompts.json"
        if not path.exists():
            with writing(path):
                content = json.dumps(self._collector.preview_prompts(), ensure_ascii=False)
                write_atomically(path, content.encode())
        prompts: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return prompts

    def _frames(self, number: int, prompts: int) -> list[Path]:
        return [self._folder / f"round-{number:04d}-{i}.png" for i in range(prompts)]

    def _draw(self, prompts: list[str], last: int) -> None:
        if not prompts:
            return
        shown = sorted({round(i * last / (_MOST_FRAMES - 1)) for i in range(_MOST_FRAMES)})
        rows = []
        for i, prompt in enumerate(prompts):
            frames = [self._frames(number, len(prompts))[i] for number in shown]
            cells = [
                GridCell(image=Image.open(frame)) if frame.exists() else None for frame in frames
            ]
            rows.append(GridRow(caption=prompt, cells=cells))
        titles = [f"round {number}" if number else "start" for number in shown]
        with writing(self._strip):
            self._strip.parent.mkdir(parents=True, exist_ok=True)
            draw_grid(rows, titles).save(self._strip)
