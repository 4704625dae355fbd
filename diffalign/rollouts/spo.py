"""SPO: pairs of single reverse steps, compared where they are taken.

At every step of a sampler a few candidates are sampled and scored at their own noise level; the
best and the worst are a pair for the step that led to them. A pair is a fact about its step alone,
not a verdict on a whole image handed down to all of its steps.

Source: Liang et al. 2024, arXiv:2406.04314, as in RockeyCoss/SPO, whose two samplers are one here:
see `rollouts.resampling`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from diffalign.config import MAY_CHANGE
from diffalign.data.batches import StepBatch
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError, DataError
from diffalign.files import (
    read_json,
    write_atomically,
    write_image,
    write_json,
    write_json_lines,
    writing,
)
from diffalign.generation.prompts import PromptsConfig, read_prompts
from diffalign.imaging.grid import (
    GridCell,
    GridRow,
    evenly_spaced,
    evenly_spaced_with_ends,
    render_grid,
)
from diffalign.imaging.image_files import encode_png, read_image
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.parsing import checked
from diffalign.ranges import AtLeast, Between
from diffalign.rollouts.base import (
    AbstractImageRollouts,
    Phase,
    RoundSummary,
    RunContext,
    Work,
)
from diffalign.rollouts.comparisons import Comparison, PairBuilder, in_words, summarise
from diffalign.rollouts.pairing import Temperature, strength_of
from diffalign.rollouts.preview_strip import AbstractImageCollector
from diffalign.rollouts.resampling import Continuation, Resampler, Segment
from diffalign.rollouts.round_order import Visit, in_batches, own_parts, pack_pool, visits_of_round
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.scoring import (
    Scorers,
    WatchedRollouts,
    ask,
    component_name,
    watched_figures,
)
from diffalign.rollouts.store import (
    LATENTS,
    STEPS,
    StepPair,
    read_steps,
    step_batch,
    write_steps,
    write_tensors,
)
from diffalign.scorers.base import AbstractScorer
from diffalign.seeding import derive_seed
from diffalign.shapes import check_image_size

SCORES = "scores.jsonl"
GRID = "grid.png"

_MOST_GRID_ROWS = 8
_SHOWN_COMPARISONS = 3


@dataclass(frozen=True, kw_only=True)
class Stepwise(WatchedRollouts, AbstractImageRollouts):
    """Rounds of step-wise resampling (SPO). Defaults are those of the authors' SD 1.5 config."""

    batch_type: ClassVar[type] = StepBatch
    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    prompts: PromptsConfig | Path = field(metadata=MAY_CHANGE)
    """A prompt file, or the keys of a choice of prompts; rounds walk through all of them."""
    prompts_per_round: Annotated[int, AtLeast(1)]
    """Prompts that a round samples, over all processes, before the policy is trained on them. SPO:
    40 for SD 1.5 and 8 for SDXL, of 4000."""
    scorer: AbstractScorer
    """Who compares candidates. One that takes the timestep scorers them as noisy as they are; any
    other one is shown the same predictions and takes them for finished images."""
    candidates: Annotated[int, AtLeast(2)] = 4
    """Branches of each branch point. SPO: 4 for SD 1.5, 2 for SDXL."""
    first_step: Annotated[int, AtLeast(0)] = 4
    """How many steps are taken before the first branch; they are not trained."""
    steps_per_segment: Annotated[int, AtLeast(1)] = 1
    """Steps that candidates take before they are compared; one comparison labels all of them. SPO:
    1 for SD 1.5, 4 for SDXL (the branch and `num_inner_step` 3)."""
    threshold: Annotated[
        float, Between(0, 1, "it is compared with a difference of probabilities", without=[1])
    ] = 0.3
    """A comparison counts if the difference of softmax([best, worst]) exceeds this, in [0, 1): 0.3
    is a gap of 0.62 between scores, 0.4 one of 0.85. SPO: 0.3 for SD 1.5, 0.4 for SDXL."""
    continue_from: Continuation = "random"
    """The candidate from which a sampler goes on, prompt by prompt. Going on from the best or the
    worst is the paper's ablation that breaks training: states are then no longer the policy's."""
    temperature: Temperature = None
    """Take the preference for the best candidate as sigmoid(gap / temperature) of its score and the
    worst one's, and not as certain. At 1 it is what `threshold` is compared with: (1 + difference)
    / 2. Null is SPO's: the better one wins for certain."""
    size: tuple[int, int] | None = None
    """(height, width) of the images in pixels; null is the network's own."""
    prompts_per_batch: Annotated[int, AtLeast(1)] = 8
    """Prompts sampled side by side on a device; what is sampled depends on it by float rounding."""
    rendered_prompts: Annotated[int, AtLeast(0)] = 8
    """Prompts of a round of which images are kept, of the best and the worst candidate at three
    noise levels, for `grid.png`; scores are kept of all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_size(self.size)

    @property
    def strength(self) -> Mapping[str, str]:
        return strength_of(self.temperature)

    def describe(self) -> str:
        way = "step" if self.steps_per_segment == 1 else f"{self.steps_per_segment} steps"
        article = "a" if self.continue_from == "random" else "the"
        return (
            f"rounds of {self.prompts_per_round} prompts; after step {self.first_step}, every "
            f"{way} {self.candidates} candidates, compared by {component_name(self.scorer)}, going "
            f"on from {article} {self.continue_from} one; best and worst count if they differ by "
            f"more than {self.threshold:g}"
        )

    def open(self, run: RunContext) -> AbstractSource:
        process = run.required_process()
        if self.first_step >= process.steps:
            raise ConfigError(
                f"rollouts.first_step is {self.first_step}, and likelihood.process.steps is "
                f"{process.steps}: no step is left to compare"
            )
        return Rounds(self, _Collector(self, run, process), run)


@dataclass(frozen=True)
class _Batch:
    """Consecutive visits of a round, sampled side by side."""

    round_number: int
    first: int
    """Number of its first visit in the round."""
    visits: Sequence[Visit]

    @property
    def record(self) -> str:
        """The file of its comparisons, and of the pairs of steps that they label."""
        return f"batches/{self.first:05d}.json"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The file of a batch."""

    pairs: Sequence[StepPair]
    comparisons: Sequence[Comparison]


class _Collector(AbstractImageCollector):
    def __init__(self, settings: Stepwise, run: RunContext, process: ReverseProcess) -> None:
        self._settings = settings
        self._run = run
        self._process = process
        self._watched = Scorers(settings.watch)
        self._prompts = [prompt.text for prompt in read_prompts(settings.prompts)]
        self._branches = range(settings.first_step, process.steps, settings.steps_per_segment)
        self._resampler = Resampler(
            process=process,
            score_images=partial(ask, settings.scorer),
            candidates=settings.candidates,
            first_step=settings.first_step,
            steps_per_segment=settings.steps_per_segment,
            threshold=settings.threshold,
            continue_from=settings.continue_from,
            size=settings.size,
        )

    def describe(self) -> list[str]:
        settings = self._settings
        trained = self._process.steps - settings.first_step
        return [
            f"{len(self._prompts):,} prompts; each visit makes {len(self._branches)} comparisons "
            f"that label {trained} pairs of steps, {settings.prompts_per_round * trained:,} a "
            f"round if all of them count"
        ]

    def fingerprint(self) -> str:
        parts = [*self._prompts, self._settings.scorer.fingerprint]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def preview_prompts(self) -> list[str]:
        return evenly_spaced(self._prompts, self._settings.previewed_prompts)

    def preview_process(self) -> ReverseProcess:
        return self._process

    def warm_up(self, model: DiffusionModel) -> None:
        for scorers in (Scorers([self._settings.scorer]), self._watched):
            scorers.warm_up(self._prompts[0], model.device)

    def phases(self, number: int) -> Iterator[Phase]:
        settings = self._settings
        visits = visits_of_round(
            self._prompts, number, count=settings.prompts_per_round, run_seed=self._run.run_seed
        )
        works = []
        for i, part in enumerate(in_batches(visits, settings.prompts_per_batch)):
            batch = _Batch(number, i * settings.prompts_per_batch, part)
            images = len(part) * settings.candidates * len(self._branches)
            works.append(Work(batch.record, images, partial(self._sample, batch)))
        yield Phase("sample and compare", works)

    def _sample(self, batch: _Batch, model: DiffusionModel, folder: Path) -> None:
        """Write images, then latents, then the record, which says that the work is done."""
        builder = PairBuilder(
            batch.visits,
            round_number=batch.round_number,
            first_visit=batch.first,
            file=f"latents/{batch.first:05d}.safetensors",
            temperature=self._settings.temperature,
        )
        with model.sampling():
            for segment in self._resampler.segments(model, batch.visits):
                builder.add(segment, self._look_on(batch, segment))
                if segment.first in self._shown_branches():
                    self._write_images(folder, batch, segment)
        if builder.pairs:
            write_tensors(folder / builder.file, {LATENTS: builder.latents()})
        record = _Record(pairs=builder.pairs, comparisons=builder.comparisons)
        path = folder / batch.record
        with writing(path):
            write_json(path, asdict(record))

    def _look_on(self, batch: _Batch, segment: Segment) -> list[list[dict[str, float | None]]]:
        """What watched scorers say of the finished candidates of each visit; empty of others."""
        if segment.t > 0 or not self._watched.names:
            return []
        count = segment.images.shape[1]
        prompts = [visit.prompt for visit in batch.visits for _ in range(count)]
        images = segment.images.flatten(end_dim=1).clamp(-1, 1)
        found = self._watched.score_tensors(images, prompts)
        return [found[i * count : (i + 1) * count] for i in range(len(batch.visits))]

    def _shown_branches(self) -> list[int]:
        """Steps whose comparisons are kept as images: the first, one halfway, the last."""
        return evenly_spaced_with_ends(self._branches, _SHOWN_COMPARISONS)

    def _write_images(self, folder: Path, batch: _Batch, segment: Segment) -> None:
        selection = segment.selection
        for i in range(min(len(batch.visits), self._settings.rendered_prompts - batch.first)):
            for candidate in {int(selection.best[i]), int(selection.worst[i])}:
                file = folder / _image_file(batch.first + i, segment.t, candidate)
                with writing(file):
                    write_atomically(file, encode_png(segment.images[i, candidate]))

    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        files = sorted((folder / "batches").glob("*.json"))
        records = [checked(_Record, read_json(file), file) for file in files]
        pairs = [pair for record in records for pair in record.pairs]
        comparisons = [row for record in records for row in record.comparisons]
        if all(score is None for row in comparisons for score in row.scores):
            raise DataError(
                f"{folder}: the scorer {component_name(self._settings.scorer)} gave none of the "
                f"round's candidates a finite score. Look at the images there; where they are as "
                f"they should be, the scorer is at fault, else the model: go back to an earlier "
                f"checkpoint with a lower optimizer.lr"
            )
        write_steps(folder, pairs)
        write_json_lines(folder / SCORES, map(asdict, comparisons))
        self._render_grid(number, folder, comparisons)
        summary = summarise(comparisons)
        seen = [scores for row in comparisons for scores in row.watched]
        watched, words = watched_figures(self._watched, seen)
        micro_batches = len(self._pack(number, len(pairs)))
        trained = micro_batches * self._run.layout.micro_batch
        unknown = sum(row.difference is None for row in comparisons)
        return RoundSummary(
            micro_batches=micro_batches,
            summary={**summary, **watched, "pairs": len(pairs), "trained_pairs": trained},
            skipped={"comparisons without finite scores": unknown} if unknown else {},
            sentence=f"{', '.join([in_words(summary), *words])}; {trained:,} of {len(pairs):,} "
            f"pairs of steps fill optimiser steps",
        )

    def _render_grid(self, number: int, folder: Path, comparisons: Sequence[Comparison]) -> None:
        """For a few prompts the best and the worst of what was compared, from noisy to finished."""
        by_branch = {
            branch: {row.visit: row for row in comparisons if row.step == branch}
            for branch in self._shown_branches()
        }
        shown = min(
            _MOST_GRID_ROWS, self._settings.rendered_prompts, self._settings.prompts_per_round
        )
        rows = []
        for visit in range(shown):
            next_to = [by_visit[visit] for by_visit in by_branch.values()]
            cells = [cell for row in next_to for cell in _cells(folder, row)]
            rows.append(GridRow(caption=next_to[0].prompt, cells=cells))
        if not rows:
            return
        times = [by_visit[0].t for by_visit in by_branch.values()]
        titles = [f"{side}, t {t}" for t in times for side in ("best", "worst")]
        scorer = component_name(self._settings.scorer)
        with writing(folder / GRID):
            title = f"round {number}, compared by {scorer}; framed where the comparison counts"
            write_image(folder / GRID, render_grid(rows, titles, title=title))

    def batches(self, number: int, folder: Path, samples: int) -> Iterator[StepBatch]:
        pairs = read_steps(folder)
        for part in own_parts(self._pack(number, len(pairs)), self._run.layout, samples):
            yield step_batch(folder, [pairs[row] for row in part])

    def _pack(self, number: int, pairs: int) -> list[list[int]]:
        """Global micro-batches of rows of the round's pairs."""
        return pack_pool(
            range(pairs),
            rows=self._run.layout.micro_batch,
            accumulation=self._run.layout.micro_batches,
            seed=derive_seed(self._run.run_seed, "packing", number),
        )

    def release(self, folder: Path) -> None:
        for file in (*folder.glob("latents/*"), *folder.glob("batches/*"), folder / STEPS):
            file.unlink(missing_ok=True)


def _image_file(visit: int, t: int, candidate: int) -> str:
    return f"images/{visit:05d}-t{t:03d}-{candidate}.png"


def _cells(folder: Path, row: Comparison) -> list[GridCell]:
    """The best and the worst candidate of a comparison."""
    cells = []
    for candidate in (row.best, row.worst):
        image = read_image(folder / _image_file(row.visit, row.t, candidate))
        best = row.valid and candidate == row.best
        cells.append(GridCell(image=image, score=row.scores[candidate], winner=best))
    return cells
