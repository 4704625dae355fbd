"""Pairs of trajectories of which one is preferred, and the batches of steps that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from diffalign.data.batches import StepBatch
from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast
from diffalign.rollouts.base import AbstractImageRollouts, RunContext
from diffalign.rollouts.round_order import own_parts, pack_pairs
from diffalign.rollouts.store import StepPair, step_batch
from diffalign.seeding import derive_seed


@dataclass(frozen=True, kw_only=True)
class AbstractTrajectoryRollouts(AbstractImageRollouts):
    """Pairs of whole trajectories, whose steps train."""

    batch_type: ClassVar[type] = StepBatch
    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    trained_steps: Annotated[int, AtLeast(1)] | None = None
    """How many steps of a trajectory are trained on, from the first one, which leaves from noise;
    null is all of them, as published. The last steps decide little of what an image shows, and
    since they add little noise, their log-densities have by far the largest gradients."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryPair:
    """Two trajectories of a file, of which one is preferred."""

    pair_id: str
    prompt: str
    file: str
    """Of latents, relative to the folder that its readers know."""
    trajectories: int
    """How many the file holds."""
    chosen: int
    rejected: int
    weight: float | None = None
    """How much the pair counts; None where all count alike."""
    preference: float | None = None
    """Probability that the chosen one is the preferred one; None where it certainly is."""

    def step(self, index: int, times: tuple[int, int]) -> StepPair:
        """The pair at one of its steps, to which the preference applies unchanged.

        Args:
            index: of the step, from 0.
            times: where it leaves from and arrives.
        """
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        before, after = index * self.trajectories, (index + 1) * self.trajectories
        t, t_next = times
        return StepPair(
            sample_id=f"{self.pair_id}/step-{index}",
            prompt=self.prompt,
            file=self.file,
            t=t,
            t_next=t_next,
            states={view: before + number for view, number in sides.items()},
            outcomes={view: after + number for view, number in sides.items()},
            preference=self.preference,
            weight=self.weight,
        )


class PairedSteps:
    """The trained steps of every pair, in D3PO's order: see `pack_pairs`."""

    def __init__(self, run: RunContext, trained_steps: int | None = None) -> None:
        """Assemble the order of a run.

        Args:
            run: whose likelihood measures the steps.
            trained_steps: see `AbstractTrajectoryRollouts`.

        Raises:
            ConfigError: it measures something else, or takes fewer steps.
        """
        self.process = run.required_process()
        """How the steps were taken."""
        if trained_steps is not None and trained_steps > self.process.steps:
            raise ConfigError(
                f"rollouts.trained_steps is {trained_steps}, and likelihood.process.steps is "
                f"{self.process.steps}: train on at most so many, or on all of them with null"
            )
        noising = run.diffusion.noising().variance_preserving()
        self._times = noising.reverse_times(self.process.steps)[:trained_steps]
        self._layout = run.layout
        self._run_seed = run.run_seed

    def steps(self, pairs: int) -> int:
        """How many steps of so many pairs could be trained on."""
        return pairs * len(self._times)

    def micro_batches(self, number: int, pairs: int) -> int:
        """How many a round trains on."""
        return len(self._pack(number, pairs))

    def trained(self, micro_batches: int) -> int:
        """How many steps so many micro-batches hold."""
        return micro_batches * self._layout.micro_batch

    def describe(self) -> str:
        """One line for the start of a run."""
        count, of = len(self._times), self.process.steps
        which = "" if count == of else f", those of the first {count} of {of} steps"
        return (
            f"each pair of images gives {count} pairs of steps{which}, and an optimiser step "
            f"takes {self._layout.samples_per_step} of them"
        )

    def batches(
        self, number: int, pairs: Sequence[TrajectoryPair], folder: Path, samples: int
    ) -> Iterator[StepBatch]:
        """This rank's parts of a round, one a forward pass.

        Args:
            number: of the round; every round has an order of its own.
            pairs: the same on every rank.
            folder: in which their files lie.
            samples: those of the round that all ranks have seen before.
        """
        for part in own_parts(self._pack(number, len(pairs)), self._layout, samples):
            steps = [pairs[pair].step(step, self._times[step]) for pair, step in part]
            yield step_batch(folder, steps)

    def _pack(self, number: int, pairs: int) -> list[list[tuple[int, int]]]:
        """Global micro-batches of (pair, step)."""
        return pack_pairs(
            [[(pair, step) for step in range(len(self._times))] for pair in range(pairs)],
            rows=self._layout.micro_batch,
            accumulation=self._layout.micro_batches,
            seed=derive_seed(self._run_seed, "packing", number),
        )
