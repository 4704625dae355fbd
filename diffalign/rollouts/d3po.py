"""D3PO with scorers: images of one prompt are compared whole, and every step of both learns from
it.

A round samples prompts; of each it samples several images that start from the same noise, and
scores them. A pair of which one side is preferred gives one training pair per step of the sampler.

    round-0000/   grid.png  images/  scores.jsonl  pairs.jsonl
                  latents/  scores/   of each batch, until the round is trained on

Source: Yang et al. 2023, arXiv:2311.13231, as in scripts/rm/train_d3po.py of yk7333/d3po.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from diffalign import components
from diffalign.config import MAY_CHANGE
from diffalign.data.batches import StepBatch
from diffalign.data.source import AbstractSource
from diffalign.files import inside, read_rows, write_atomically, write_json_lines, writing
from diffalign.generation.prompts import PromptsConfig, read_prompts
from diffalign.imaging.grid import evenly_spaced
from diffalign.imaging.image_files import encode_png
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.ranges import AtLeast
from diffalign.rollouts.base import (
    Phase,
    RoundSummary,
    RunContext,
    Work,
)
from diffalign.rollouts.pairing import (
    Pairing,
    PairRule,
    RankedGroup,
    Temperature,
    Weighting,
    certainty_weights,
    chosen_pairs,
    from_best_to_worst,
    mean_gap,
    pair_up,
    preference_of,
    render_ranked_grid,
    strength_of,
)
from diffalign.rollouts.preview_strip import AbstractImageCollector
from diffalign.rollouts.round_order import Visit, in_batches, visits_of_round
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.scoring import (
    ScoredImage,
    Scorers,
    WatchedRollouts,
    in_words,
    means_of,
    refuse_scorers_of_noise,
    watched_figures,
)
from diffalign.rollouts.trajectories import finite, sample_groups, write_trajectories
from diffalign.rollouts.trajectory_pairs import (
    AbstractTrajectoryRollouts,
    PairedSteps,
    TrajectoryPair,
)
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.repeats import Perturbation
from diffalign.shapes import check_image_size

_SCORES = "scores.jsonl"
_PAIRS = "pairs.jsonl"
_GRID = "grid.png"


@dataclass(frozen=True, kw_only=True)
class WholeImage(WatchedRollouts, AbstractTrajectoryRollouts):
    """Rounds of images that scores compare."""

    prompts: PromptsConfig | Path = field(metadata=MAY_CHANGE)
    """A prompt file, or the keys of a choice of prompts; rounds walk through all of them."""
    scorers: tuple[AbstractScorer, ...]
    """The scorers. With several, a side is preferred if it is at least as good under each of them
    and better under one."""
    prompts_per_round: Annotated[int, AtLeast(1)]
    """Prompts that a round samples, over all processes."""
    prompts_per_batch: Annotated[int, AtLeast(1)] = 4
    """Prompts whose images are sampled at once on one device; memory grows with their product with
    `images_per_prompt`."""
    images_per_prompt: Annotated[int, AtLeast(2, "one has none to be compared with")] = 2
    """Images of each prompt, all from the same start noise; D3PO has 2."""
    pairs: PairRule = "all"
    """Which decided pairs of a prompt are trained on: `all`; with `best_worst` only that of the
    image that wins most and the one that loses most; with `fronts` those between images that none
    beats and images that beat none, which with several scorers leaves out the middle."""
    temperature: Temperature = None
    """Take a pair's preference as sigmoid(gap / temperature) of its scores, with several scorers of
    the mean of their gaps, and not as certain: a gap of one temperature is 0.73. Null is D3PO's:
    whichever score is better wins for certain."""
    repeats: Annotated[int, AtLeast(1)] = 1
    """How many copies of each image are scored, the image itself and slightly other ones: its score
    is their mean, and above 1 it has a standard deviation, which says how far it can be trusted."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    """How the copies differ from the image."""
    weight: Weighting = "alike"
    """How much a pair counts: with `certainty` by one over the standard deviation of its gap of
    scores, which takes `repeats`; weights are 1 in the mean of a round, and the surest pair has a
    tenth of the mean deviation at least. Ctrl-U (arXiv:2410.11236) weighs rewards so."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels; null is the network's own."""
    kept_images: Annotated[int, AtLeast(0)] = 64
    """Images that stay on disk when a round is over, out of its first ones; its grid and its scores
    stay whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorers:
            raise ValueError("scorers is empty: name at least one scorer, such as kind: pickscore")
        refuse_scorers_of_noise(self.scorers)
        if self.repeats > 1:
            for scorer in self.scorers:
                scorer.refuse_comparing("rollouts.repeats")
        elif self.weight == "certainty":
            raise ValueError(
                "weight is certainty, which the deviation over copies tells, and repeats is 1: set "
                "repeats to 4 or so, or weight to alike"
            )
        elif self.perturbation != Perturbation():
            raise ValueError(
                "perturbation says how copies of an image differ, and repeats is 1, the image "
                "itself: set repeats to 4 or so, or leave perturbation out"
            )
        check_image_size(self.size)

    @property
    def strength(self) -> Mapping[str, str]:
        return strength_of(self.temperature, self.weight)

    def open(self, run: RunContext) -> AbstractSource:
        return Rounds(self, _Collector(self, run), run)

    def describe(self) -> str:
        scorers = " and ".join(components.kind_of(scorer) for scorer in self.scorers)
        return (
            f"rounds of {self.prompts_per_round} prompts x {self.images_per_prompt} images, "
            f"{self.pairs.replace('_', ' against ')} pairs by {scorers}"
        )


@dataclass(frozen=True)
class _Batch:
    """Consecutive visits of a round, sampled and scored together whatever the number of ranks."""

    first: int
    """Number of its first visit in the round."""
    visits: Sequence[Visit]
    images: int
    """Of each visit."""

    @property
    def latents(self) -> str:
        """The file of its trajectories."""
        return f"latents/{self.first:04d}.safetensors"

    @property
    def scores(self) -> str:
        """The file of its scores."""
        return f"scores/{self.first:04d}.jsonl"

    def places(self) -> list[tuple[int, int]]:
        """Place of the visit in the batch, and number of the image, of each trajectory."""
        return [(v, image) for v in range(len(self.visits)) for image in range(self.images)]

    def files(self) -> list[str]:
        """The file of the final image of each trajectory."""
        return [f"images/{self.first + v:04d}-{image}.png" for v, image in self.places()]

    def prompts(self) -> list[str]:
        """The prompt of each trajectory."""
        return [self.visits[v].prompt for v, _ in self.places()]


class _Collector(AbstractImageCollector):
    def __init__(self, rollouts: WholeImage, run: RunContext) -> None:
        self._settings = rollouts
        self._run = run
        self._steps = PairedSteps(run, rollouts.trained_steps)
        self._scorers = Scorers(
            rollouts.scorers, repeats=rollouts.repeats, perturbation=rollouts.perturbation
        )
        self._watched = Scorers(rollouts.watch)
        self._prompts = [prompt.text for prompt in read_prompts(rollouts.prompts)]

    def describe(self) -> list[str]:
        return [f"{len(self._prompts)} prompts; {self._steps.describe()}"]

    def fingerprint(self) -> str:
        parts = "\0".join([*self._prompts, *self._scorers.fingerprints()])
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()

    def preview_prompts(self) -> list[str]:
        return evenly_spaced(self._prompts, self._settings.previewed_prompts)

    def preview_process(self) -> ReverseProcess:
        return self._steps.process

    def warm_up(self, model: DiffusionModel) -> None:
        for scorers in (self._scorers, self._watched):
            scorers.warm_up(self._prompts[0], model.device)

    def phases(self, number: int) -> Iterator[Phase]:
        batches = self._batches(number)

        yield Phase(
            "sample",
            [Work(b.latents, len(b.places()), partial(self._sample, b)) for b in batches],
        )
        yield Phase(
            "score",
            [Work(b.scores, len(b.places()), partial(self._score, b)) for b in batches],
        )

    def _batches(self, number: int) -> list[_Batch]:
        settings = self._settings
        visits = visits_of_round(
            self._prompts, number, count=settings.prompts_per_round, run_seed=self._run.run_seed
        )
        size = settings.prompts_per_batch
        return [
            _Batch(i * size, part, settings.images_per_prompt)
            for i, part in enumerate(in_batches(visits, size))
        ]

    def _sample(self, batch: _Batch, model: DiffusionModel, folder: Path) -> None:
        """Write the images, then the latents, which say that the work is done."""
        sampled = sample_groups(
            model,
            self._steps.process,
            batch.visits,
            images=batch.images,
            size=self._settings.size,
        )
        decoded = model.autoencoder.decode(sampled.latents[-1]).cpu()
        for name, pixels, usable in zip(batch.files(), decoded, finite(sampled), strict=True):
            if usable and torch.isfinite(pixels).all():
                with writing(folder / name):
                    write_atomically(folder / name, encode_png(pixels))
        write_trajectories(folder / batch.latents, sampled)

    def _score(self, batch: _Batch, model: DiffusionModel, folder: Path) -> None:
        names, prompts = batch.files(), batch.prompts()
        files = [folder / name for name in names]
        measured = self._scorers.measure(files, prompts, model.device)
        watched = self._watched.score_images(files, prompts, model.device)
        rows = [
            ScoredImage(batch.first + v, prompt, image, name, own.scores, others, own.deviations)
            for (v, image), prompt, name, own, others in zip(
                batch.places(), prompts, names, measured, watched, strict=True
            )
        ]
        write_json_lines(folder / batch.scores, map(asdict, rows))

    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        batches = self._batches(number)
        images = [row for batch in batches for row in read_rows(ScoredImage, folder / batch.scores)]
        write_json_lines(folder / _SCORES, map(asdict, images))
        self._scorers.refuse_silence(images, folder)
        by_visit: dict[int, list[ScoredImage]] = {}
        for image in images:
            by_visit.setdefault(image.visit, []).append(image)
        pairings = {visit: _pair_up(group) for visit, group in by_visit.items()}
        scored = {(image.visit, image.image): image for image in images}
        made = [pair for batch in batches for pair in self._pairs(number, batch, pairings, scored)]
        pairs = [pair for pair, _ in made]
        if self._settings.weight == "certainty":
            weights = certainty_weights([deviation for _, deviation in made])
            pairs = [replace(p, weight=weight) for p, weight in zip(pairs, weights, strict=True)]
        write_json_lines(folder / _PAIRS, map(asdict, pairs))
        first = self._scorers.names[0]
        render_ranked_grid(
            folder / _GRID,
            [_ranked(folder, group, pairings[visit], first) for visit, group in by_visit.items()],
            title=f"round {number}, by {' and '.join(self._scorers.names)}",
        )
        return self._summary(number, images, list(pairings.values()), len(pairs))

    def _pairs(
        self,
        number: int,
        batch: _Batch,
        pairings: Mapping[int, Pairing],
        scored: Mapping[tuple[int, int], ScoredImage],
    ) -> Iterator[tuple[TrajectoryPair, float]]:
        """The pairs of a batch, and the standard deviation of each one's gap of scores."""
        place = {at: i for i, at in enumerate(batch.places())}
        for v, visit in enumerate(batch.visits):
            name = batch.first + v
            for chosen, rejected in chosen_pairs(pairings[name], self._settings.pairs):
                images = scored[name, chosen], scored[name, rejected]
                better, worse = (image.vector() for image in images)
                assert better is not None and worse is not None, "pairs are of scored images"
                pair = TrajectoryPair(
                    pair_id=f"round-{number}/{name:04d}/{chosen}-over-{rejected}",
                    prompt=visit.prompt,
                    file=batch.latents,
                    trajectories=len(place),
                    chosen=place[v, chosen],
                    rejected=place[v, rejected],
                    preference=preference_of(mean_gap(better, worse), self._settings.temperature),
                )
                yield pair, images[0].gap_deviation(images[1])

    def batches(self, number: int, folder: Path, samples: int) -> Iterator[StepBatch]:
        pairs = read_rows(TrajectoryPair, folder / _PAIRS)
        return self._steps.batches(number, pairs, folder, samples)

    def _summary(
        self, number: int, images: Sequence[ScoredImage], pairings: Sequence[Pairing], pairs: int
    ) -> RoundSummary:
        micro_batches = self._steps.micro_batches(number, pairs)
        steps, trained = self._steps.steps(pairs), self._steps.trained(micro_batches)
        decided = sum(len(pairing.decided) for pairing in pairings)
        tied = sum(pairing.tied for pairing in pairings)
        incomparable = sum(pairing.incomparable for pairing in pairings)
        compared = decided + tied + incomparable
        skipped = {"tied pairs": tied, "incomparable pairs": incomparable}
        skipped["images that were not finite"] = sum(not image.scores for image in images)
        summary: dict[str, float] = {
            "images": len(images),
            "scored": sum(len(image.scores) for image in images),
            "pairs": pairs,
            "decided_share": decided / max(compared, 1),
            "tied_share": tied / max(compared, 1),
            "steps": trained,
            "steps_dropped": steps - trained,
        }
        said = []
        for name in self._scorers.names:
            given = [image.scores[name] for image in images if image.scores]
            skipped[f"images without a finite score by {name}"] = given.count(None)
            found = means_of(name, given)
            over_copies = [d for i in images if (d := i.deviations.get(name)) is not None]
            copies = {}
            if over_copies:
                copies = {f"{name}_deviation": statistics.fmean(over_copies)}
            about = "".join(f" ({value:.2g} over copies)" for value in copies.values())
            said.append(f"{name} {in_words(found)}{about}")
            summary |= found | copies
        watched, words = watched_figures(self._watched, [image.watched for image in images])
        summary |= watched
        said += words
        skipped["steps that filled no optimiser step"] = steps - trained
        undecided = {"tied": tied, "incomparable": incomparable}
        verdicts = [f"{decided} of {compared} pairs decided"]
        verdicts += [f"{count} {verdict}" for verdict, count in undecided.items() if count]
        return RoundSummary(
            micro_batches=micro_batches,
            summary=summary,
            skipped={reason: count for reason, count in skipped.items() if count},
            sentence=f"{len(images)} images, {', '.join(said)}; {', '.join(verdicts)}; training on "
            f"{trained} of {steps} steps",
        )

    def release(self, folder: Path) -> None:
        surplus = sorted(folder.glob("images/*.png"))[self._settings.kept_images :]
        for file in (*folder.glob("latents/*"), *folder.glob("scores/*"), *surplus):
            file.unlink(missing_ok=True)


def _pair_up(group: Sequence[ScoredImage]) -> Pairing:
    vectors = {image.image: image.vector() for image in group}
    return pair_up({image: vector for image, vector in vectors.items() if vector is not None})


def _ranked(
    folder: Path, group: Sequence[ScoredImage], pairing: Pairing, score_images: str
) -> RankedGroup:
    """Images without all scores come last."""
    scored = [image.image for image in group if image.vector() is not None]
    others = [image.image for image in group if image.image not in scored]
    by_number = {image.image: image for image in group}
    ranked = [by_number[i] for i in [*from_best_to_worst(pairing, scored), *others]]
    return RankedGroup(
        prompt=group[0].prompt,
        files=[inside(folder, image.file) for image in ranked],
        scores=[image.scores.get(score_images) for image in ranked],
    )
