"""Step-wise resampling: candidates for one step of a sampler, scored while they are still noisy.

A sampler branches from one state into k candidates. Each walks alone to the next branch point, and
there the prediction of what it will become is scored at its own noise level; the best and the worst
make a comparison, and the sampler goes on from one of them. Segments of one step are SPO's variant
for SD 1.5, longer ones its variant for SDXL. Where a segment ends, the candidates' predictions are
also those of the next branch, so going on costs no evaluation of the network.

Source: Liang et al. 2024, arXiv:2406.04314, sections 3.2 and 3.3; spo/custom_diffusers/
multi_sample_pipeline.py and multi_sample_pipeline_sdxl.py of RockeyCoss/SPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractVariancePreserving
from diffalign.models.diffusion.reverse import ReverseProcess, ReverseStep, reverse_step
from diffalign.rollouts.round_order import Visit
from diffalign.seeding import derive_seed, noise_from_seeds

Continuation = Literal["random", "best", "worst"]
"""From which candidate a sampler goes on."""

StepScorer = Callable[[Tensor, Sequence[str], int], Tensor]
"""Scores of [n] images for their n prompts, all at one timestep."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The extremes of k candidates, for each of n prompts."""

    best: Tensor
    """Index of the highest score, int64 [n]; the first of equal ones."""
    worst: Tensor
    """Index of the lowest score, int64 [n]; the first of equal ones."""
    difference: Tensor
    """Probability by which the best beats the worst minus that of the opposite, [n] in [0, 1); NaN
    where a score is not finite."""
    valid: Tensor
    """Whether the comparison says enough to train on, bool [n]."""


def select(scores: Tensor, *, threshold: float) -> Selection:
    """Compare the best candidate with the worst.

    Args:
        scores: shape [n, k]; higher is better. A row with a score that is not finite is not valid.
        threshold: what the difference of softmax([best, worst]) must exceed.
    """
    known = scores.isfinite()
    best = scores.masked_fill(~known, -torch.inf).argmax(dim=1)
    worst = scores.masked_fill(~known, torch.inf).argmin(dim=1)
    rows = torch.arange(len(scores), device=scores.device)
    gap = scores[rows, best] - scores[rows, worst]
    difference = torch.tanh(0.5 * gap).masked_fill(~known.all(dim=1), torch.nan)
    return Selection(best=best, worst=worst, difference=difference, valid=difference > threshold)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """From one branch point to the next: k candidates for each of n prompts."""

    first: int
    """Index of the sampler's step that branched."""
    times: tuple[tuple[int, int], ...]
    """Of each step: the timestep that it leaves from, and the one at which it arrives."""
    t: int
    """Timestep at which the candidates were scored; 0 where they are finished."""
    origin: Tensor
    """The state that the candidates share, float32 [n, channels, h, w], on the CPU."""
    paths: Tensor
    """Where they arrived step by step, float32 [steps, n, k, channels, h, w], on the CPU."""
    images: Tensor
    """The images that were scored, float32 [n, k, 3, H, W], not clamped, on the model's device."""
    scores: Tensor
    """Shape [n, k], on the CPU."""
    selection: Selection
    continued: Tensor
    """The candidate from which the sampler went on, int64 [n]."""


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """How trajectories branch, and who compares the branches."""

    process: ReverseProcess
    score_images: StepScorer
    candidates: int
    """k, at least 2."""
    first_step: int
    """Index of the first step that branches; those before are taken as usual."""
    steps_per_segment: int
    threshold: float
    continue_from: Continuation
    size: tuple[int, int] | None
    """(height, width) in pixels; None is the network's own."""

    def segments(self, model: DiffusionModel, visits: Sequence[Visit]) -> Iterator[Segment]:
        """Sample n visits side by side, segment by segment; to be called within `model.sampling()`.

        All noise derives from the seed of a visit, the step and the candidate.
        """
        trunk = _Trajectories(model, self.process, visits, copies=1, size=self.size)
        crown = _Trajectories(model, self.process, visits, copies=self.candidates, size=self.size)
        of_visit = torch.arange(len(visits), device=model.device)
        state = trunk.start()
        for index in range(self.first_step):
            state = trunk.sample(trunk.look(state, index), index)
        ahead = trunk.look(state, self.first_step)
        for first in range(self.first_step, self.process.steps, self.steps_per_segment):
            end = min(first + self.steps_per_segment, self.process.steps)
            paths = [crown.sample(ahead.rows(of_visit.repeat_interleave(self.candidates)), first)]
            for index in range(first + 1, end):
                paths.append(crown.sample(crown.look(paths[-1], index), index))
            finished = end == self.process.steps
            if not finished:
                ahead = crown.look(paths[-1], end)
            images = model.autoencoder.decode(
                paths[-1] if finished else ahead.denoised, clamp=False
            )
            t = 0 if finished else crown.times[end][0]
            scores = crown.unflatten(self.score_images(images, crown.prompts, t).detach().cpu())
            selection = select(scores, threshold=self.threshold)
            continued = self._continued(selection, visits, end)
            yield Segment(
                first=first,
                times=tuple(crown.times[first:end]),
                t=t,
                origin=state.cpu(),
                paths=torch.stack([crown.unflatten(path.cpu()) for path in paths]),
                images=crown.unflatten(images),
                scores=scores,
                selection=selection,
                continued=continued,
            )
            if not finished:
                kept = of_visit * self.candidates + send(continued, model.device)
                state, ahead = paths[-1][kept], ahead.rows(kept)

    def _continued(self, selection: Selection, visits: Sequence[Visit], index: int) -> Tensor:
        """The candidate of each visit from which the step of this index will leave."""
        if self.continue_from == "random":
            samples = [derive_seed(visit.seed, "continue", index) for visit in visits]
            return torch.tensor([sample % self.candidates for sample in samples])
        return selection.best if self.continue_from == "best" else selection.worst


class _Trajectories:
    """n visits, each as several trajectories side by side; the copies of a visit are neighbours."""

    def __init__(
        self,
        model: DiffusionModel,
        process: ReverseProcess,
        visits: Sequence[Visit],
        *,
        copies: int,
        size: tuple[int, int] | None,
    ) -> None:
        noising = model.noising
        assert isinstance(noising, AbstractVariancePreserving), "Transition.check comes first"
        self._noising = noising
        self._device = model.device
        self._eta = process.eta
        self._seeds = [visit.seed for visit in visits]
        self._copies = copies
        self._shape = model.latent_space.shape(size)
        self.times = noising.reverse_times(process.steps)
        self.prompts = [visit.prompt for visit in visits for _ in range(copies)]
        self._denoise = model.denoiser(self.prompts, guidance=process.guidance, size=size)

    def start(self) -> Tensor:
        """Pure noise; the copies of a visit share it."""
        seeds = [derive_seed(seed, "start") for seed in self._seeds for _ in range(self._copies)]
        return self._noise(seeds)

    def look(self, states: Tensor, index: int) -> ReverseStep:
        """Where the step of this index may lead."""
        t, t_next = self.times[index]
        return reverse_step(self._denoise, self._noising, states, t, t_next, eta=self._eta)

    def sample(self, step: ReverseStep, index: int) -> Tensor:
        """Where it does lead; copies part here, if they have not before."""
        copies = range(self._copies)
        seeds = [derive_seed(seed, index, copy) for seed in self._seeds for copy in copies]
        return step.arrive(self._noise(seeds))

    def unflatten(self, rows: Tensor) -> Tensor:
        """[n * copies, ...] as [n, copies, ...]."""
        return rows.unflatten(0, (len(self._seeds), self._copies))

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return send(noise_from_seeds(seeds, self._shape), self._device)
