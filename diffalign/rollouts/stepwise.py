"""SPO: pairs of single reverse steps, compared where they are taken.

At every step of a sampler a few candidates are drawn and judged at their own noise level; the best
and the worst are a pair for the step that led to them. A pair is a fact about its step alone, not a
verdict on a whole image handed down to all of its steps.

Source: Liang et al. 2024, arXiv:2406.04314, as in RockeyCoss/SPO, whose two samplers are one here:
see `rollouts.resampling`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign import components, world
from diffalign.data.batches import StepBatch
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation.generation import encode_png
from diffalign.evaluation.grid import GridCell, GridRow, draw_grid
from diffalign.evaluation.manifest import write_atomically
from diffalign.evaluation.prompts import PromptsConfig, read_prompts
from diffalign.models.denoiser import DiffusionModel
from diffalign.models.reverse import ReverseProcess
from diffalign.rollouts.base import (
    AbstractCollector,
    AbstractRollouts,
    Harvest,
    Phase,
    RunFacts,
    Work,
)
from diffalign.rollouts.packing import pack_pool
from diffalign.rollouts.resampling import Continuation, Resampler, Segment
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.schedule import Visit, in_batches, visits_of_round
from diffalign.rollouts.store import (
    LATENTS,
    StepPair,
    read_steps,
    step_batch,
    write_lines,
    write_steps,
    write_tensors,
    writing,
)
from diffalign.scorers.base import AbstractScorer
from diffalign.seeding import derive_seed

_GRID_ROWS = 12
_THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, kw_only=True)
class Stepwise(AbstractRollouts):
    """Rounds of step-wise resampling (SPO). Defaults are those of the authors' SD 1.5 config."""

    batch_type: ClassVar[type] = StepBatch
    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    prompts: PromptsConfig
    """All prompts; rounds walk through them in random order."""
    prompts_per_round: int
    """Sampled before the policy is trained on them. SPO: all 4000."""
    scorer: AbstractScorer
    """Who compares candidates. One that takes the timestep judges them as noisy as they are; any
    other one is shown the same predictions and takes them for finished images."""
    candidates: int = 4
    """Branches of each branch point. SPO: 4 for SD 1.5, 2 for SDXL."""
    first_step: int = 4
    """How many steps are taken before the first branch; they are not trained."""
    steps_per_segment: int = 1
    """Steps that candidates take before they are compared; one comparison labels all of them. SPO:
    1 for SD 1.5, 4 for SDXL (the branch and `num_inner_step` 3)."""
    threshold: float = 0.3
    """A comparison counts if the difference of softmax([best, worst]) exceeds this, in [0, 1): 0.3
    is a gap of 0.62 between scores, 0.4 one of 0.85. SPO: 0.3 for SD 1.5, 0.4 for SDXL."""
    continue_from: Continuation = "random"
    """The candidate from which a sampler goes on, prompt by prompt. Going on from the best or the
    worst is the paper's ablation that breaks training: states are then no longer the policy's."""
    size: tuple[int, int] | None = None
    """(height, width) of the images in pixels; null is the network's own."""
    prompts_per_batch: int = 8
    """Prompts sampled side by side on a device; what is drawn depends on it by float rounding."""
    pictured_prompts: int = 64
    """Prompts of a round whose finished candidates are kept as pictures; scores are kept of all."""
    previews: int = 4
    """Prompts that every round draws from the same noise, for the film strip."""

    def __post_init__(self) -> None:
        least = {
            "prompts_per_round": 1,
            "candidates": 2,
            "first_step": 0,
            "steps_per_segment": 1,
            "prompts_per_batch": 1,
            "pictured_prompts": 0,
            "previews": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"threshold must be in [0, 1), got {self.threshold}: it is compared with a "
                f"difference of two probabilities"
            )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be [height, width] in pixels, got {list(self.size)}")

    def describe(self) -> str:
        kind = components.kind_of(self.scorer)
        return (
            f"step-wise: {self.prompts_per_round} prompts a round, {self.candidates} candidates "
            f"every {self.steps_per_segment} steps after {self.first_step}, judged by {kind}, "
            f"counting above {self.threshold:g}, going on from the {self.continue_from} one"
        )

    def open(self, run: RunFacts) -> AbstractSource:
        if run.process is None:
            raise ConfigError(
                "rollouts stepwise yields reverse steps: set likelihood.kind to transition"
            )
        if self.first_step >= run.process.steps:
            raise ConfigError(
                f"rollouts.first_step is {self.first_step}, and likelihood.process.steps is "
                f"{run.process.steps}: no step is left to compare"
            )
        prompts = [prompt.text for prompt in read_prompts(self.prompts)]
        return Rounds(self, StepwiseCollector(self, run, run.process, prompts), run)


class StepwiseCollector(AbstractCollector):
    """Samples batches of prompts, one after another or on several ranks, and pools their steps."""

    def __init__(
        self, settings: Stepwise, run: RunFacts, process: ReverseProcess, prompts: Sequence[str]
    ) -> None:
        """Args:
        settings: of the rounds.
        run: of which run.
        process: how it samples.
        prompts: all of them, at least one.
        """
        self._settings = settings
        self._run = run
        self._process = process
        self._prompts = prompts
        self._resampler = Resampler(
            process=process,
            judge=self._judge,
            candidates=settings.candidates,
            first_step=settings.first_step,
            steps_per_segment=settings.steps_per_segment,
            threshold=settings.threshold,
            continue_from=settings.continue_from,
            size=settings.size,
        )

    def describe(self) -> list[str]:
        compared = math.ceil(self._trained_steps / self._settings.steps_per_segment)
        per_round = self._settings.prompts_per_round * self._trained_steps
        return [
            f"rounds of {self._settings.prompts_per_round} of {len(self._prompts):,} prompts; each "
            f"is compared {compared} times, which makes {per_round:,} pairs of steps a round if "
            f"every comparison counts"
        ]

    def fingerprint(self) -> str:
        parts = (self._settings.scorer.fingerprint, *self._prompts)
        return f"{derive_seed(*parts):016x}"

    def preview_prompts(self) -> list[str]:
        return list(self._prompts[: self._settings.previews])

    def preview_process(self) -> ReverseProcess:
        return self._process

    def phases(self, number: int) -> Iterator[Phase]:
        visits = visits_of_round(
            self._prompts,
            number,
            count=self._settings.prompts_per_round,
            run_seed=self._run.run_seed,
        )
        compared = math.ceil(self._trained_steps / self._settings.steps_per_segment)
        works, start = [], 0
        for i, batch in enumerate(in_batches(visits, self._settings.prompts_per_batch)):
            images = len(batch) * self._settings.candidates * compared
            works.append(Work(f"batch-{i:05d}.json", images, _Batch(number, start, tuple(batch))))
            start += len(batch)
        yield Phase("sample and compare", works, self._sample)

    @property
    def _trained_steps(self) -> int:
        return self._process.steps - self._settings.first_step

    def _judge(self, pictures: Tensor, prompts: Sequence[str], t: int) -> Tensor:
        scorer = self._settings.scorer
        scorer.to(pictures.device)
        if scorer.takes_time:
            return scorer.score(pictures, prompts, torch.full((len(prompts),), t))
        return scorer.score(pictures, prompts)

    def _sample(self, model: DiffusionModel, work: Work, folder: Path) -> None:
        batch: _Batch = work.what
        kept = _Kept(batch, latents_file=f"{Path(work.file).stem}.safetensors")
        with model.sampling():
            for segment in self._resampler.segments(model, batch.visits):
                kept.add(segment)
                pictures = segment.pictures  # of the last one: finished
        for number, candidates in enumerate(pictures.cpu(), start=batch.start):
            if number < self._settings.pictured_prompts:
                for candidate, picture in enumerate(candidates):
                    file = folder / _picture(number, candidate)
                    with writing(file):
                        write_atomically(file, encode_png(picture))
        if kept.steps:
            write_tensors(folder / kept.latents_file, {LATENTS: kept.latents()})
        record = {
            "steps": [asdict(step) for step in kept.steps],
            "comparisons": [asdict(comparison) for comparison in kept.comparisons],
        }
        with writing(folder / work.file):
            write_atomically(folder / work.file, json.dumps(record, ensure_ascii=False).encode())

    def harvest(self, number: int, folder: Path) -> Harvest:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in _records(folder)]
        steps = [StepPair(**step) for record in records for step in record["steps"]]
        comparisons = [Comparison(**row) for record in records for row in record["comparisons"]]
        finished = [comparison for comparison in comparisons if comparison.t == 0]
        if all(score is None for row in comparisons for score in row.scores):
            raise DataError(
                f"{components.kind_of(self._settings.scorer)}: every score of round {number} is "
                f"infinite or not a number, so nothing can be compared. Look at the pictures in "
                f"{folder}: either they are broken, or the scorer's weights are"
            )
        write_steps(folder, steps)
        write_lines(folder / "comparisons.jsonl", map(asdict, comparisons))
        write_lines(folder / "scores.jsonl", self._finished_scores(finished))
        self._draw_grid(folder, finished)
        summary = _summary(comparisons, finished)
        micro_batches = len(self._packed(number, len(steps)))
        unknown = sum(comparison.difference is None for comparison in comparisons)
        return Harvest(
            micro_batches=micro_batches,
            summary=summary,
            skipped={"comparisons with a score that is not finite": unknown} if unknown else {},
            sentence=self._sentence(summary, len(comparisons), len(steps), micro_batches),
        )

    def _finished_scores(self, finished: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
        for comparison in finished:
            pictured = comparison.visit < self._settings.pictured_prompts
            for candidate, score in enumerate(comparison.scores):
                yield {
                    "file": _picture(comparison.visit, candidate) if pictured else None,
                    "prompt": comparison.prompt,
                    "score": score,
                }

    def _draw_grid(self, folder: Path, finished: Sequence[Comparison]) -> None:
        rows = []
        for comparison in finished[: min(_GRID_ROWS, self._settings.pictured_prompts)]:
            cells = []
            for candidate, score in enumerate(comparison.scores):
                with Image.open(folder / _picture(comparison.visit, candidate)) as image:
                    image.load()
                best = comparison.valid and candidate == comparison.best
                cells.append(GridCell(image=image, score=score, winner=best))
            rows.append(GridRow(caption=comparison.prompt, cells=cells))
        if rows:
            titles = [f"candidate {i + 1}" for i in range(self._settings.candidates)]
            with writing(folder):
                draw_grid(rows, titles).save(folder / "grid.png")

    def _sentence(
        self, summary: dict[str, float], comparisons: int, steps: int, micro_batches: int
    ) -> str:
        thirds = ", ".join(
            f"{summary[f'valid_{third}']:.0%} {third}"
            for third in _THIRDS
            if f"valid_{third}" in summary
        )
        trained = micro_batches * self._rows
        return (
            f"scores of finished candidates {summary['score_mean']:.4g} +- "
            f"{summary['score_std']:.2g}; {summary['valid']:.0%} of {comparisons:,} comparisons "
            f"count ({thirds}); {trained:,} of {steps:,} pairs of steps trained in "
            f"{micro_batches // self._run.accumulation:,} optimiser steps"
        )

    def batches(self, number: int, folder: Path, start: int) -> Iterator[StepBatch]:
        steps = read_steps(folder)
        mine = world.rank() * self._run.samples_per_device
        for rows in self._packed(number, len(steps))[start:]:
            part = rows[mine : mine + self._run.samples_per_device]
            yield step_batch(folder, [steps[row] for row in part])

    def _packed(self, number: int, steps: int) -> list[list[int]]:
        return pack_pool(
            range(steps),
            rows=self._rows,
            accumulation=self._run.accumulation,
            seed=derive_seed(self._run.run_seed, "pack", number),
        )

    @property
    def _rows(self) -> int:
        """Of a global micro-batch."""
        return self._run.samples_per_device * world.size()

    def release(self, folder: Path) -> None:
        for path in (*folder.glob("batch-*.safetensors"), *_records(folder)):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Batch:
    """Visits that are sampled side by side."""

    round: int
    start: int
    """Number of the first of them in its round."""
    visits: tuple[Visit, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the candidates of a prompt fared at the end of a segment: a line of a round's file."""

    visit: int
    """Number of the prompt in its round."""
    prompt: str
    step: int
    """Index of the sampler's step that branched."""
    t: int
    """Timestep at which the candidates were judged; 0 where they were finished."""
    scores: list[float | None]
    """Of the candidates; None where not finite."""
    best: int
    worst: int
    difference: float | None
    """See `resampling.Selection`; None where a score is not finite."""
    valid: bool
    """Whether the segment's steps are trained on."""
    continued: int
    """The candidate from which the sampler went on."""


class _Kept:
    """What is kept of a batch: all comparisons, and the latents that the steps of valid ones need,
    each once."""

    def __init__(self, batch: _Batch, *, latents_file: str) -> None:
        self.latents_file = latents_file
        self.steps: list[StepPair] = []
        self.comparisons: list[Comparison] = []
        self._batch = batch
        self._origins = [0] * len(batch.visits)  # the candidates from which the segment leaves
        self._latents: list[Tensor] = []
        self._rows: dict[tuple[int, int, int], int] = {}  # visit, steps taken, candidate -> row

    def latents(self) -> Tensor:
        """The rows of the file, float32 [rows, channels, h, w]."""
        return torch.stack(self._latents)

    def add(self, segment: Segment) -> None:
        """Take what the next segment came to."""
        for i in range(len(self._batch.visits)):
            self.comparisons.append(self._comparison(segment, i))
            if segment.selection.valid[i]:
                self._add_steps(segment, i)
        self._origins = segment.continued.tolist()

    def _comparison(self, segment: Segment, i: int) -> Comparison:
        selection = segment.selection
        return Comparison(
            visit=self._batch.start + i,
            prompt=self._batch.visits[i].prompt,
            step=segment.first,
            t=segment.t,
            scores=[_finite(score) for score in segment.scores[i].tolist()],
            best=int(selection.best[i]),
            worst=int(selection.worst[i]),
            difference=_finite(float(selection.difference[i])),
            valid=bool(selection.valid[i]),
            continued=int(segment.continued[i]),
        )

    def _add_steps(self, segment: Segment, i: int) -> None:
        sides = {"chosen": segment.selection.best, "rejected": segment.selection.worst}
        candidates = {view: int(side[i]) for view, side in sides.items()}
        origin = self._row((i, segment.first, self._origins[i]), segment.origin[i])
        states = dict.fromkeys(candidates, origin)
        visit = self._batch.start + i
        for taken, (t, t_next) in enumerate(segment.times):
            index = segment.first + taken
            outcomes = {
                view: self._row((i, index + 1, candidate), segment.paths[taken, i, candidate])
                for view, candidate in candidates.items()
            }
            self.steps.append(
                StepPair(
                    sample_id=f"round-{self._batch.round:04d}/prompt-{visit}/step-{index}",
                    prompt=self._batch.visits[i].prompt,
                    file=self.latents_file,
                    t=t,
                    t_next=t_next,
                    states=states,
                    outcomes=outcomes,
                )
            )
            states = outcomes

    def _row(self, place: tuple[int, int, int], latent: Tensor) -> int:
        if place not in self._rows:
            self._rows[place] = len(self._latents)
            self._latents.append(latent)
        return self._rows[place]


def _summary(comparisons: Sequence[Comparison], finished: Sequence[Comparison]) -> dict[str, float]:
    """Figures of a round: the score of what was finished, and how many comparisons count."""
    scores = [score for row in finished for score in row.scores if score is not None]
    figures = {
        "score_mean": statistics.fmean(scores) if scores else math.nan,
        "score_std": statistics.pstdev(scores) if scores else math.nan,
        "valid": statistics.fmean(comparison.valid for comparison in comparisons),
    }
    branches = sorted({comparison.step for comparison in comparisons})
    for third, name in enumerate(_THIRDS):
        steps = {step for i, step in enumerate(branches) if 3 * i // len(branches) == third}
        valid = [comparison.valid for comparison in comparisons if comparison.step in steps]
        if valid:
            figures[f"valid_{name}"] = statistics.fmean(valid)
    return figures


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("batch-*.json"))


def _picture(visit: int, candidate: int) -> str:
    return f"images/{visit:05d}-{candidate}.png"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
