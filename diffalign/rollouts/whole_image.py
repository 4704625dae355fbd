"""D3PO with judges: images of one prompt are compared whole, and every step of both learns from it.

A round draws prompts; of each it samples several images that start from the same noise, and judges
them. A pair of which one side is preferred gives one training pair per step of the sampler.

Source: Yang et al. 2023, arXiv:2311.13231, as in scripts/rm/train_d3po.py of yk7333/d3po.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from diffalign.evaluation.manifest import read_json_lines, write_atomically
from diffalign.evaluation.pictures import pixels_of
from diffalign.evaluation.prompts import PromptsConfig, read_prompts
from diffalign.models.denoiser import DiffusionModel
from diffalign.models.noising import AbstractVariancePreserving
from diffalign.models.reverse import ReverseProcess
from diffalign.rollouts.base import (
    AbstractCollector,
    AbstractRollouts,
    Harvest,
    Phase,
    RunFacts,
    Work,
)
from diffalign.rollouts.packing import own_share, pack_pairs
from diffalign.rollouts.pairing import (
    Pairing,
    PairRule,
    chosen_pairs,
    from_best_to_worst,
    pair_up,
)
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.schedule import Visit, in_batches, visits_of_round
from diffalign.rollouts.store import step_batch, write_lines, writing
from diffalign.rollouts.trajectories import (
    TrajectoryPair,
    all_finite,
    sample_groups,
    write_trajectories,
)
from diffalign.scorers.base import AbstractScorer
from diffalign.seeding import derive_seed

LATENTS_FOLDER = "latents"
SCORES = "scores.jsonl"
PAIRS = "pairs.jsonl"
GRID = "grid.png"

_GRID_ROWS = 6
_GRID_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class WholeImage(AbstractRollouts):
    """Rounds of images that judges compare."""

    batch_type: ClassVar[type] = StepBatch
    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    prompts: PromptsConfig | Path
    """A prompt file, or the keys of a choice of prompts; rounds walk through all of them."""
    scorers: tuple[AbstractScorer, ...]
    """The judges. With several, a side is preferred if it is at least as good under each of them
    and better under one."""
    prompts_per_round: int
    """Prompts that a round draws, over all processes."""
    prompts_per_batch: int = 4
    """Prompts whose images are sampled at once on one device; memory grows with their product with
    `images_per_prompt`."""
    images_per_prompt: int = 2
    """Images of each prompt, all from the same start noise; D3PO has 2."""
    pairs: PairRule = "all"
    """Which decided pairs of a prompt are trained on: `all`, or with `best_worst` only that of the
    image that wins most and the one that loses most."""
    size: tuple[int, ...] | None = None
    """Height and width of the images in pixels; null is the network's own."""
    previewed_prompts: int = 4
    """How many prompts every round draws from the same noise, for `film_strip.png`."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_round", "prompts_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt must be at least 2, got {self.images_per_prompt}: one image "
                f"has none to be compared with"
            )
        if self.previewed_prompts < 0:
            raise ValueError(f"previewed_prompts must be 0 or more, got {self.previewed_prompts}")
        if not self.scorers:
            raise ValueError("scorers is empty: name at least one judge, such as kind: pickscore")
        for scorer in self.scorers:
            if scorer.takes_time:
                raise ValueError(
                    f"scorers names {components.kind_of(scorer)}, which judges noisy images at a "
                    f"timestep: whole images are finished, and stepwise takes such a judge"
                )
        if self.size is not None and len(self.size) != 2:
            raise ValueError(f"size is a height and a width, got {list(self.size)}")

    def open(self, run: RunFacts) -> AbstractSource:
        return Rounds(self, _Collector(self, run), run)

    def describe(self) -> str:
        judges = " and ".join(components.kind_of(scorer) for scorer in self.scorers)
        return (
            f"rounds of {self.prompts_per_round} prompts x {self.images_per_prompt} images, "
            f"{self.pairs.replace('_', ' against ')} pairs by {judges}"
        )


@dataclass(frozen=True)
class _Batch:
    """Consecutive visits of a round, sampled and judged together."""

    first: int
    """Number of its first visit in the round."""
    visits: Sequence[Visit]


@dataclass(frozen=True)
class _Judged:
    """One image of a round, as a line of `scores.jsonl`."""

    visit: int
    prompt: str
    image: int
    file: str
    """Relative to the round's folder; it is absent where the image was not finite."""
    scores: Mapping[str, float | None]
    """By scorer; None where it gave no finite score. Empty where there is no image."""

    @property
    def judged(self) -> bool:
        return bool(self.scores) and None not in self.scores.values()


class _Collector(AbstractCollector):
    def __init__(self, rollouts: WholeImage, run: RunFacts) -> None:
        if run.process is None:
            raise ConfigError(
                "rollouts whole_image learns from the steps of a sampler: set likelihood.kind to "
                "transition"
            )
        noising = run.model.noising()
        assert isinstance(noising, AbstractVariancePreserving), "the likelihood was checked"
        self._settings = rollouts
        self._run = run
        self._process = run.process
        self._times = noising.reverse_times(run.process.steps)
        self._scorers = _by_name(rollouts.scorers)
        self._prompts = [prompt.text for prompt in read_prompts(rollouts.prompts)]

    def describe(self) -> list[str]:
        rows = self._run.samples_per_device * world.size() * self._run.accumulation
        per_pair = self._process.steps
        return [
            f"{len(self._prompts)} prompts; each pair of images gives {per_pair} pairs of steps, "
            f"and an optimiser step takes {rows} of them"
        ]

    def fingerprint(self) -> str:
        parts = [*self._prompts, *(scorer.fingerprint for scorer in self._scorers.values())]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def preview_prompts(self) -> list[str]:
        count = min(self._settings.previewed_prompts, len(self._prompts))
        return [self._prompts[i * len(self._prompts) // count] for i in range(count)]

    def preview_process(self) -> ReverseProcess:
        return self._process

    def phases(self, number: int) -> Iterator[Phase]:
        batches = self._batches(number)
        yield Phase("sample", self._works(batches, _latents_file), self._sample)
        yield Phase("score", self._works(batches, _scores_file), self._score)

    def _batches(self, number: int) -> list[_Batch]:
        """Cut without regard to ranks, so that an image never changes its company."""
        visits = visits_of_round(
            self._prompts,
            number,
            count=self._settings.prompts_per_round,
            run_seed=self._run.run_seed,
        )
        size = self._settings.prompts_per_batch
        return [_Batch(i * size, part) for i, part in enumerate(in_batches(visits, size))]

    def _works(self, batches: Sequence[_Batch], file: Any) -> list[Work]:
        images = self._settings.images_per_prompt
        return [Work(file(batch), len(batch.visits) * images, batch) for batch in batches]

    def _sample(self, model: DiffusionModel, work: Work, folder: Path) -> None:
        """Write the pictures, then the latents, which say that the work is done."""
        batch: _Batch = work.what
        drawn = sample_groups(
            model,
            self._process,
            batch.visits,
            images=self._settings.images_per_prompt,
            size=self._size(),
        )
        finite = all_finite(drawn)
        pictures = model.decode_images(drawn.latents[-1]).cpu()
        for place, picture in enumerate(pictures):
            if finite[place] and torch.isfinite(picture).all():
                file = folder / self._image_file(batch, place)
                with writing(file):
                    write_atomically(file, encode_png(picture))
        write_trajectories(folder / work.file, drawn)

    def _size(self) -> tuple[int, int] | None:
        size = self._settings.size
        return None if size is None else (size[0], size[1])

    def _image_file(self, batch: _Batch, place: int) -> str:
        visit, image = divmod(place, self._settings.images_per_prompt)
        return f"images/{batch.first + visit:04d}-{image}.png"

    def _score(self, model: DiffusionModel, work: Work, folder: Path) -> None:
        """Judge what the files hold, 8 bits a channel, as whoever looks at the round sees it."""
        batch: _Batch = work.what
        files = [self._image_file(batch, place) for place in range(work.images)]
        there = [place for place, file in enumerate(files) if (folder / file).exists()]
        visits = [divmod(place, self._settings.images_per_prompt) for place in range(work.images)]
        scores: dict[int, dict[str, float | None]] = {place: {} for place in range(work.images)}
        if there:
            images = torch.stack([_read_picture(folder / files[place]) for place in there])
            prompts = [batch.visits[visits[place][0]].prompt for place in there]
            for name, scorer in self._scorers.items():
                judged = _judge(name, scorer.to(model.device), images.to(model.device), prompts)
                for place, score in zip(there, judged, strict=True):
                    scores[place][name] = score
        rows = [
            _Judged(batch.first + visit, batch.visits[visit].prompt, image, file, scores[place])
            for place, ((visit, image), file) in enumerate(zip(visits, files, strict=True))
        ]
        write_lines(folder / work.file, map(asdict, rows))

    def harvest(self, number: int, folder: Path) -> Harvest:
        batches = self._batches(number)
        rows = [
            _Judged(**row)
            for batch in batches
            for row in read_json_lines(folder / _scores_file(batch))
        ]
        self._refuse_silent_judges(rows, folder)
        write_lines(folder / SCORES, map(asdict, rows))
        by_visit = self._by_visit(rows)
        pairings = {
            visit: pair_up({row.image: self._vector(row) for row in images if row.judged})
            for visit, images in by_visit.items()
        }
        pairs = [pair for batch in batches for pair in self._pairs(number, batch, pairings)]
        write_lines(folder / PAIRS, map(asdict, pairs))
        self._draw_grid(number, folder, by_visit, pairings)
        return self._harvest(rows, pairings, pairs, len(self._pack(number, pairs)))

    def _refuse_silent_judges(self, rows: Sequence[_Judged], folder: Path) -> None:
        drawn = [row for row in rows if row.scores]
        if not drawn:
            raise DataError(
                f"{folder}: the policy drew no image without values that are not finite, so there "
                f"is nothing to compare. Go back to an earlier checkpoint with a lower "
                f"optimizer.lr, or use precision bf16 or float32"
            )
        for name in self._scorers:
            if all(row.scores[name] is None for row in drawn):
                raise DataError(
                    f"{folder}: the scorer {name} gave none of the round's {len(drawn)} images a "
                    f"finite score. Look at the pictures there; where they are as they should be, "
                    f"the scorer is at fault: try it on them with diffalign score"
                )

    def _by_visit(self, rows: Sequence[_Judged]) -> dict[int, list[_Judged]]:
        by_visit: dict[int, list[_Judged]] = {}
        for row in rows:
            by_visit.setdefault(row.visit, []).append(row)
        return by_visit

    def _vector(self, row: _Judged) -> list[float]:
        return [score for score in row.scores.values() if score is not None]

    def _pairs(
        self, number: int, batch: _Batch, pairings: Mapping[int, Pairing]
    ) -> Iterator[TrajectoryPair]:
        images = self._settings.images_per_prompt
        for place, visit in enumerate(batch.visits):
            for chosen, rejected in chosen_pairs(
                pairings[batch.first + place], self._settings.pairs
            ):
                yield TrajectoryPair(
                    pair_id=f"round-{number}/{batch.first + place:04d}/{chosen}-over-{rejected}",
                    prompt=visit.prompt,
                    file=_latents_file(batch),
                    trajectories=images * len(batch.visits),
                    chosen=place * images + chosen,
                    rejected=place * images + rejected,
                )

    def _pack(self, number: int, pairs: Sequence[TrajectoryPair]) -> list[list[tuple[int, int]]]:
        """Global micro-batches of (pair, step)."""
        return pack_pairs(
            [[(pair, step) for step in range(len(self._times))] for pair in range(len(pairs))],
            rows=self._run.samples_per_device * world.size(),
            accumulation=self._run.accumulation,
            seed=derive_seed(self._run.run_seed, "packing", number),
        )

    def batches(self, number: int, folder: Path, start: int) -> Iterator[StepBatch]:
        pairs = [TrajectoryPair(**row) for row in read_json_lines(folder / PAIRS)]
        for batch in self._pack(number, pairs)[start:]:
            steps = [pairs[pair].step(step, self._times) for pair, step in own_share(batch)]
            yield step_batch(folder, steps)

    def _harvest(
        self,
        rows: Sequence[_Judged],
        pairings: Mapping[int, Pairing],
        pairs: Sequence[TrajectoryPair],
        micro_batches: int,
    ) -> Harvest:
        tied = sum(pairing.tied for pairing in pairings.values())
        incomparable = sum(pairing.incomparable for pairing in pairings.values())
        decided = sum(len(pairing.decided) for pairing in pairings.values())
        compared = decided + tied + incomparable
        steps = len(pairs) * len(self._times)
        trained = micro_batches * self._run.samples_per_device * world.size()
        skipped = Counter(
            {
                "tied pairs": tied,
                "incomparable pairs": incomparable,
                "images that were not finite": sum(not row.scores for row in rows),
                **{
                    f"images without a finite score from {name}": sum(
                        bool(row.scores) and row.scores[name] is None for row in rows
                    )
                    for name in self._scorers
                },
                "steps that filled no optimiser step": steps - trained,
            }
        )
        summary: dict[str, float] = {
            "images": len(rows),
            "pairs": len(pairs),
            "decided_share": decided / max(compared, 1),
            "tied_share": tied / max(compared, 1),
            "steps": trained,
        }
        said = []
        for name in self._scorers:
            values = [score for row in rows if (score := row.scores.get(name)) is not None]
            mean, spread = _mean_and_spread(values)
            summary |= {f"{name}_mean": mean, f"{name}_std": spread}
            said.append(f"{name} {mean:.4g} \N{PLUS-MINUS SIGN} {spread:.2g}")
        sentence = (
            f"{len(rows)} images, {', '.join(said)}; {decided} of {compared} pairs decided"
            f"{f', {tied} tied' if tied else ''}"
            f"{f', {incomparable} incomparable' if incomparable else ''}; {trained} of {steps} "
            f"pairs of steps fill optimiser steps"
        )
        return Harvest(
            micro_batches=micro_batches,
            summary=summary,
            skipped={reason: count for reason, count in skipped.items() if count},
            sentence=sentence,
        )

    def _draw_grid(
        self,
        number: int,
        folder: Path,
        by_visit: Mapping[int, list[_Judged]],
        pairings: Mapping[int, Pairing],
    ) -> None:
        """A few prompts; of each the images from best to worst, under the first scorer's score."""
        name = next(iter(self._scorers))
        visits = list(by_visit)
        shown = [visits[i * len(visits) // _GRID_ROWS] for i in range(_GRID_ROWS)]
        ranks = _spread(self._settings.images_per_prompt, _GRID_COLUMNS)
        rows = []
        for visit in dict.fromkeys(shown):
            images = {row.image: row for row in by_visit[visit]}
            judged = [image for image, row in images.items() if row.judged]
            ranked = from_best_to_worst(pairings[visit], judged)
            ranked += [image for image in images if image not in ranked]
            cells = [_cell(folder, images[ranked[rank]], name) for rank in ranks]
            rows.append(GridRow(caption=by_visit[visit][0].prompt, cells=cells))
        titles = [
            {0: "best", self._settings.images_per_prompt - 1: "worst"}.get(rank, str(rank + 1))
            for rank in ranks
        ]
        path = folder / GRID
        with writing(path):
            draw_grid(rows, titles, title=f"round {number}, by {' and '.join(self._scorers)}").save(
                path
            )

    def release(self, folder: Path) -> None:
        for file in (folder / LATENTS_FOLDER).glob("*"):
            file.unlink(missing_ok=True)


def _latents_file(batch: _Batch) -> str:
    return f"{LATENTS_FOLDER}/{batch.first:04d}.safetensors"


def _scores_file(batch: _Batch) -> str:
    return f"scores/{batch.first:04d}.jsonl"


def _by_name(scorers: Sequence[AbstractScorer]) -> dict[str, AbstractScorer]:
    """The last part of a scorer's kind, and a number where several share it."""
    named: dict[str, AbstractScorer] = {}
    for scorer in scorers:
        name = components.kind_of(scorer).rpartition(".")[2]
        taken = sum(other.rpartition("_")[0] == name or other == name for other in named)
        named[f"{name}_{taken + 1}" if taken else name] = scorer
    return named


def _read_picture(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pixels_of(image)


def _judge(
    name: str, scorer: AbstractScorer, images: Tensor, prompts: Sequence[str]
) -> list[float | None]:
    """Scores as a JSON file holds them: None where one is not finite."""
    try:
        with torch.inference_mode():
            scores = scorer.score(images, prompts)
    except ValueError as error:
        raise DataError(f"the scorer {name} refuses the round's images: {error}") from error
    if scores.shape != (len(images),):
        raise DataError(
            f"the scorer {name} must give {len(images)} images as many scores, and returned the "
            f"shape {tuple(scores.shape)}"
        )
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std(correction=0))


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _cell(folder: Path, row: _Judged, name: str) -> GridCell | None:
    if not row.scores:
        return None
    with Image.open(folder / row.file) as image:
        return GridCell(image=image.convert("RGB"), score=row.scores[name])
