"""SePPO's rounds: preferred images of the data, each next to one that the reference samples.

A round is so many optimiser steps of preferred images. Which ones they will be is known before it
begins. So the reference, an earlier policy of the same run, first samples an image for the prompt
of each; then the preferred images come, and with them, as the view `sampled`, what was sampled.
Both views share caption, time and noise. An image that a round visits twice gets two sampled ones.

The data is gone through twice a round: decoding an image costs little next to sampling one.

Source: Zhang et al. 2024, arXiv:2410.05255, algorithm 1. Its training code is not public. That the
reference is picked once a round, how it samples, and that both views share time and noise is our
reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor

from diffalign import world
from diffalign.console import progress
from diffalign.data.batches import ImageBatch
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError, DataError
from diffalign.files import (
    read_rows,
    write_atomically,
    write_image,
    write_json_lines,
    writing,
)
from diffalign.imaging.grid import GridCell, GridRow, render_grid
from diffalign.imaging.image_files import encode_png, pixels_of, read_image, to_images
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.ranges import AtLeast
from diffalign.rollouts.base import (
    AbstractImageRollouts,
    Phase,
    ReferenceRule,
    RoundSummary,
    RunContext,
    Work,
)
from diffalign.rollouts.policy_snapshots import reference_round
from diffalign.rollouts.preview_strip import AbstractImageCollector
from diffalign.rollouts.round_order import in_batches
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.sampler import sample
from diffalign.rollouts.scoring import (
    ScoredImage,
    Scorers,
    WatchedRollouts,
    in_words,
    means_of,
    refuse_scorers_of_noise,
    watched_figures,
)
from diffalign.scorers.base import AbstractScorer
from diffalign.seeding import derive_seed

SAMPLED = "sampled"
"""Folder of what is known of sampled images, by work, and name of the file with all of it."""
SCORES = "scores"
"""The same for their scores."""
GRID = "grid.png"

_GRID_ROWS = 8
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class SemiPolicy(WatchedRollouts, AbstractImageRollouts):
    """Rounds of preferred images next to the reference's own (SePPO)."""

    batch_type: ClassVar[type] = ImageBatch
    views: ClassVar[frozenset[str]] = frozenset({"chosen", "sampled"})
    needs_data: ClassVar[bool] = True

    reference: ReferenceRule = "uniform"
    """The policy that samples, and that this round's is compared with. SePPO: `uniform`, any of
    those that this and earlier rounds began with; `initial` and `latest` are its ablations."""
    updates_per_round: Annotated[int, AtLeast(1)] = 30
    """Optimiser steps on what a round sampled. SePPO: 30, for 7 rounds."""
    process: ReverseProcess = field(
        default_factory=lambda: ReverseProcess(steps=50, guidance=7.5, eta=0.0)
    )
    """How images are sampled. The paper does not say; steps and guidance are its evaluation's."""
    images_per_batch: Annotated[int, AtLeast(1)] = 8
    """Images sampled at once on a device; what is sampled depends on it by float rounding."""
    scorers: tuple[AbstractScorer, ...] = ()
    """Scorers of what was sampled, for whoever looks at a round; nothing is trained on scores."""
    kept_images: Annotated[int, AtLeast(0)] = 64
    """Sampled images that stay on disk when a round is over, out of its first ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_scorers_of_noise(self.scorers)
        for scorer in self.scorers:
            scorer.refuse_comparing("rollouts seppo")

    def open(self, run: RunContext) -> AbstractSource:
        if run.process is not None:
            raise ConfigError(
                "rollouts seppo yields images, not steps of a sampler: set likelihood.kind "
                "to denoising"
            )
        try:
            self.process.check_steps(run.diffusion.noising())
        except ValueError as error:
            raise ConfigError(f"rollouts.process: {error}") from error
        return Rounds(self, _Collector(self, run), run)

    def describe(self) -> str:
        who = {
            "initial": "the run's first policy",
            "latest": "the policy that the round began with",
            "uniform": "one of the policies that rounds began with",
        }[self.reference]
        process = self.process
        return (
            f"rounds of {self.updates_per_round} optimiser steps; next to each preferred image one "
            f"by {who} ({process.steps} steps, guidance {process.guidance:g}, eta {process.eta:g})"
        )


@dataclass(frozen=True)
class _Visit:
    """One visit of a preferred image in a round, next to which an image is sampled."""

    place: int
    """In the order in which the round trains, over all ranks."""
    sample_id: str
    prompt: str
    """The caption, though training may drop it."""
    seed: int
    """From which all noise of the sampled image derives."""
    size: tuple[int, int]
    """(height, width) of both images."""
    resampled: int = 0
    """How often what was sampled was not finite, and sampled again."""

    @property
    def file(self) -> str:
        """The sampled image, in the round's folder."""
        return f"images/{self.place:06d}.png"


Row = TypeVar("Row", _Visit, ScoredImage)


@dataclass(frozen=True)
class _Batch:
    """Visits of one size, whose images are sampled and scored together."""

    visits: Sequence[_Visit]

    @property
    def known(self) -> str:
        """The file of what is known of them."""
        return f"{SAMPLED}/{self.visits[0].place:06d}.jsonl"

    @property
    def scores(self) -> str:
        """The file of their scores."""
        return f"{SCORES}/{self.visits[0].place:06d}.jsonl"


class _Collector(AbstractImageCollector):
    def __init__(self, settings: SemiPolicy, run: RunContext) -> None:
        self._settings = settings
        self._run = run
        self._preferred = run.open_data(frozenset({"chosen"}))
        self._scorers = Scorers(settings.scorers)
        self._watched = Scorers(settings.watch)
        self._samples = settings.updates_per_round * run.layout.samples_per_step
        self._shown: dict[int, Tensor] = {}

    def describe(self) -> list[str]:
        updates = self._settings.updates_per_round
        lines = [
            *self._preferred.describe(),
            f"a round samples {self._samples:,} images for {updates} optimiser steps",
        ]
        if self._settings.reference == "uniform" and not self._run.model.trains_adapter:
            lines.append(
                "every round keeps the policy that it began with, all weights in float32 (3.4 GB "
                "for SD 1.5, 10.3 GB for SDXL); of a LoRA it would be the adapter alone"
            )
        return lines

    def describe_end(self) -> list[str]:
        return self._preferred.describe_end()

    def fingerprint(self) -> str:
        parts = [self._preferred.fingerprint(), *self._scorers.fingerprints()]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._preferred.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._preferred.load_state_dict(state["data"])

    def preview_prompts(self) -> list[str]:
        """The first captions of the first forward passes of the main rank, however many ranks there
        are."""
        count = self._settings.previewed_prompts
        return list(dict.fromkeys(batch.captions[0] for batch in self._preferred.ahead(count)))

    def preview_process(self) -> ReverseProcess:
        return self._settings.process

    def warm_up(self, model: DiffusionModel) -> None:
        if self._settings.scorers or self._settings.watch:
            (batch,) = self._preferred.ahead(1)
            for scorers in (self._scorers, self._watched):
                scorers.warm_up(batch.captions[0], model.device)

    def phases(self, number: int) -> Iterator[Phase]:
        visits = self._visits(number)
        batches = self._batches(visits)
        yield Phase(
            "sample", [Work(b.known, len(b.visits), partial(self._sample, b)) for b in batches]
        )
        if self._settings.scorers or self._settings.watch:
            yield Phase(
                "score", [Work(b.scores, len(b.visits), partial(self._score, b)) for b in batches]
            )

    def _visits(self, number: int) -> list[_Visit]:
        """Whatever a round will train on, the same list on every rank."""
        everyone = world.gather(self._look_ahead(number))
        in_order = [row for ranks in zip(*everyone, strict=True) for rows in ranks for row in rows]
        visits: list[_Visit] = []
        seen: Counter[str] = Counter()
        for place, (sample_id, prompt, size) in enumerate(in_order):
            parts = (self._run.run_seed, "sampled", number, sample_id, seen[sample_id])
            visits.append(_Visit(place, sample_id, prompt, derive_seed(*parts), size))
            seen[sample_id] += 1
        return visits

    def _look_ahead(self, number: int) -> list[list[tuple[str, str, tuple[int, int]]]]:
        """Sample ids, captions and sizes of this rank's batches; keeps images to show."""
        starts = [part.start for part in self._run.layout.own_parts_of(0, self._samples)]
        at_once = self._run.layout.seen_after(0)
        every = max(1, len(starts) // _GRID_ROWS)
        self._shown = {}
        ahead = []
        title, total = f"round {number}, look ahead", self._samples
        with progress(self._run.console, title, total) as advance:
            for index, batch in enumerate(self._preferred.ahead(len(starts))):
                images = batch.images["chosen"]
                if index % every == 0 and len(self._shown) < _GRID_ROWS:
                    self._shown[starts[index]] = images[0].clone()
                size = (images.shape[-2], images.shape[-1])
                known = zip(batch.sample_ids, batch.captions, strict=True)
                ahead.append([(sample_id, caption, size) for sample_id, caption in known])
                advance(at_once)
        return ahead

    def _batches(self, visits: Sequence[_Visit]) -> list[_Batch]:
        """Cut without regard to ranks, so that an image never changes its company."""
        by_size: dict[tuple[int, int], list[_Visit]] = {}
        for visit in visits:
            by_size.setdefault(visit.size, []).append(visit)
        return [
            _Batch(part)
            for alike in by_size.values()
            for part in in_batches(alike, self._settings.images_per_batch)
        ]

    def _sample(self, batch: _Batch, model: DiffusionModel, folder: Path) -> None:
        """Write the images, then what is known of them, which says that the work is done.

        What is not finite is sampled again from other noise: its own would fail for ever.
        """
        done: list[_Visit] = []
        missing = list(batch.visits)
        for attempt in range(_ATTEMPTS):
            failed = []
            for visit, image in zip(
                missing, self._sample_images(missing, attempt, model), strict=True
            ):
                if torch.isfinite(image).all():
                    with writing(folder / visit.file):
                        write_atomically(folder / visit.file, encode_png(image))
                    done.append(dataclasses.replace(visit, resampled=attempt))
                else:
                    failed.append(visit)
            missing = failed
            if not missing:
                break
        else:
            raise DataError(
                f"{folder}: what the reference sampled for {missing[0].prompt!r} held values "
                f"that are "
                f"not finite {_ATTEMPTS} times. "
                + (
                    model.blame()
                    or "Begin again with a lower optimizer.lr, or with precision bf16 or float32"
                )
            )
        done.sort(key=lambda visit: visit.place)
        write_json_lines(folder / batch.known, map(asdict, done))

    def _sample_images(
        self, visits: Sequence[_Visit], attempt: int, model: DiffusionModel
    ) -> Tensor:
        """Images of some visits of one size, [n, 3, H, W], on the CPU."""
        seeds = [derive_seed(v.seed, "again", attempt) if attempt else v.seed for v in visits]
        with model.reference():
            sampled = sample(
                model,
                self._settings.process,
                [visit.prompt for visit in visits],
                start_seeds=[derive_seed(seed, "start") for seed in seeds],
                step_seeds=lambda step: [derive_seed(seed, step) for seed in seeds],
                size=visits[0].size,
            )
        return model.autoencoder.decode(sampled.latents[-1]).cpu()

    def _score(self, batch: _Batch, model: DiffusionModel, folder: Path) -> None:
        visits = batch.visits
        files = [folder / visit.file for visit in visits]
        scores, watched = (
            scorers.score_images(files, [visit.prompt for visit in visits], model.device)
            for scorers in (self._scorers, self._watched)
        )
        rows = [
            ScoredImage(visit.place, visit.prompt, 0, visit.file, own, others)
            for visit, own, others in zip(visits, scores, watched, strict=True)
        ]
        write_json_lines(folder / batch.scores, map(asdict, rows))

    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        visits = _merge(_Visit, folder, SAMPLED, by="place")
        scored = _merge(ScoredImage, folder, SCORES, by="visit")
        if scored and self._scorers.names:
            self._scorers.refuse_silence(scored, folder)
        self._render_grid(number, folder, visits, scored)
        summary: dict[str, float] = {"images": len(visits)}
        said = [f"{len(visits):,} images by {self._reference_of(number)}"]
        for name in self._scorers.names:
            found = means_of(name, [row.scores[name] for row in scored])
            summary |= found
            said.append(f"{name} {in_words(found)}")
        watched, words = watched_figures(self._watched, [row.watched for row in scored])
        summary |= watched
        said += words
        resampled = sum(visit.resampled for visit in visits)
        return RoundSummary(
            micro_batches=self._samples // self._run.layout.micro_batch,
            summary=summary,
            skipped={"images that were not finite, sampled again": resampled} if resampled else {},
            sentence=", ".join(said),
        )

    def _reference_of(self, number: int) -> str:
        sampled = reference_round(self._settings.reference, self._run.run_seed, number)
        if sampled == 0:
            return "the run's first policy"
        return f"the policy that {'it' if sampled == number else f'round {sampled}'} began with"

    def _render_grid(
        self,
        number: int,
        folder: Path,
        visits: Sequence[_Visit],
        scored: Sequence[ScoredImage],
    ) -> None:
        """A few preferred images, and what the reference sampled next to them."""
        rows = []
        for place, preferred in self._shown.items():
            score = next(iter(scored[place].scores.values()), None) if scored else None
            cells = [
                GridCell(image=to_images(preferred[None])[0]),
                GridCell(image=_open(folder, visits[place]), score=score),
            ]
            rows.append(GridRow(caption=visits[place].prompt, cells=cells))
        title = f"round {number}, sampled by {self._reference_of(number)}"
        with writing(folder / GRID):
            write_image(folder / GRID, render_grid(rows, ["chosen", "sampled"], title=title))

    def batches(self, number: int, folder: Path, samples: int) -> Iterator[ImageBatch]:
        visits = read_rows(_Visit, folder / f"{SAMPLED}.jsonl")
        parts = self._run.layout.own_parts_of(samples, self._samples)
        for part, batch in zip(parts, self._preferred, strict=False):
            yield _next_to(batch, visits[part.start : part.stop], folder)

    def release(self, folder: Path) -> None:
        for file in sorted(folder.glob("images/*.png"))[self._settings.kept_images :]:
            file.unlink(missing_ok=True)


def _merge(cls: type[Row], folder: Path, name: str, *, by: str) -> list[Row]:
    """The rows of all works of a phase in the order of the round, also as one file."""
    files = folder.glob(f"{name}/*.jsonl")
    rows = [row for file in files for row in read_rows(cls, file)]
    rows.sort(key=operator.attrgetter(by))
    if rows:
        write_json_lines(folder / f"{name}.jsonl", map(asdict, rows))
    return rows


def _next_to(batch: ImageBatch, visits: Sequence[_Visit], folder: Path) -> ImageBatch:
    """The batch with what was sampled for it as a further view, uncropped."""
    sampled_for = tuple(visit.sample_id for visit in visits)
    if sampled_for != batch.sample_ids:
        raise DataError(
            f"{folder}: the images there were sampled for {', '.join(sampled_for)}, and the data "
            f"now "
            f"gives {', '.join(batch.sample_ids)}. It has changed since: put it back as it was, or "
            f"start afresh"
        )
    images = torch.stack([pixels_of(_open(folder, visit)) for visit in visits])
    size = torch.tensor(images.shape[-2:]).repeat(len(images), 1)
    seeds = tuple(derive_seed(seed, "encoding", "sampled") for seed in batch.noise_seeds)
    return dataclasses.replace(
        batch,
        images={**batch.images, "sampled": images},
        original_sizes={**batch.original_sizes, "sampled": size},
        crop_corners={**batch.crop_corners, "sampled": torch.zeros_like(size)},
        encoding_seeds={**batch.encoding_seeds, "sampled": seeds},
    )


def _open(folder: Path, visit: _Visit) -> Image.Image:
    try:
        return read_image(folder / visit.file)
    except OSError as error:
        raise DataError(
            f"{folder / visit.file}: this image was sampled for the round and cannot be read "
            f"({error}). Delete {folder} and resume from a checkpoint of before this round, or "
            f"start afresh"
        ) from error
