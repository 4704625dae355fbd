"""Sample, score, train, repeat: rounds as a source of batches, kept on disk and resumable anywhere.

A round is a folder. While it is collected, its files appear one by one, each whole; a run that was
killed makes the missing ones. `round.json` is written last, and says with which policy the round
was sampled: a run that was killed while it trained on a round goes back to its last checkpoint, and
takes up every round that it finds again if the policy is the one that made it.

    rounds/
      round-0000/   round.json  grid.png  scores.jsonl  images/  ...
      preview_strip.png

A round trains for a whole number of optimiser steps, so the policy never changes while it samples.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffalign import world
from diffalign.blocks import share
from diffalign.console import progress
from diffalign.data.source import AbstractSource
from diffalign.errors import DataError
from diffalign.files import read_json, write_json, writing
from diffalign.models.base import AbstractTrainable
from diffalign.parsing import checked
from diffalign.rollouts.base import (
    AbstractCollector,
    AbstractRollouts,
    Phase,
    RoundSummary,
    RunContext,
)
from diffalign.rollouts.policy_snapshots import PolicySnapshots

T = TypeVar("T")

_RECORD = "round.json"
_STARTED = "begun.json"
_MOST_EMPTY_ROUNDS = 10
"""Rounds without a pair to train on, in a row, after which a run stops."""


class Rounds(AbstractSource):
    """Batches of rounds that are sampled with the policy as it is."""

    def __init__(
        self, rollouts: AbstractRollouts, collector: AbstractCollector, run: RunContext
    ) -> None:
        """Assemble a source.

        Args:
            rollouts: the settings; they name batch type, views and the reference's rule.
            collector: what happens in a round.
            run: of which run.
        """
        self.batch_type = rollouts.batch_type  # type: ignore[misc]  # of this source, not of all
        self.views = rollouts.views
        self._unit = rollouts.makes
        self._collector = collector
        self._run = run
        self._policies = PolicySnapshots(run.folder, rule=rollouts.reference, run_seed=run.run_seed)
        self._preview = collector.preview(run.folder, run.run_seed)
        self._model: AbstractTrainable | None = None
        self._number = 0
        self._samples = 0
        self._policy: str | None = None
        self._figures: dict[str, float] = {}
        self._warm = False
        self._empty_in_a_row = 0
        self._skipped: dict[str, int] = {}

    @property
    def model(self) -> AbstractTrainable:
        """The model in training."""
        assert self._model is not None, "bind comes before iteration"
        return self._model

    def bind(self, model: AbstractTrainable) -> None:
        self._model = model

    def describe(self) -> list[str]:
        return self._collector.describe()

    def describe_end(self) -> list[str]:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in self._skipped.items())
        lines = [f"left out of the rounds: {skipped}"] if skipped else []
        return [
            *lines,
            *self._collector.describe_end(),
            f"every round's samples and scores are in {self._run.folder}",
        ]

    def fingerprint(self) -> str:
        return self._collector.fingerprint()

    def captions(self, n: int) -> list[str]:
        return self._collector.captions(n)

    def figures(self) -> dict[str, float]:
        return {f"round/{name}": value for name, value in self._figures.items()}

    @property
    def skipped_counts(self) -> dict[str, int]:
        return dict(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self._number,
            "samples": self._samples,
            "policy": self._policy,
            "skipped": self._skipped,
            "pairs_per_micro_batch": self._run.layout.micro_batch,
            **self._collector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        position = dict(state)
        if "batch" in position:  # of an older checkpoint
            position["pairs_per_micro_batch"] = position.pop("rows_per_micro_batch")
            position["samples"] = position.pop("batch") * position["pairs_per_micro_batch"]
        self._run.layout.check_micro_batch(position.pop("pairs_per_micro_batch"))
        self._number, self._samples = position.pop("round"), position.pop("samples")
        self._policy = position.pop("policy")
        self._skipped = position.pop("skipped")
        self._collector.load_state_dict(position)

    def release(self, state: Mapping[str, Any]) -> None:
        if not world.is_main():
            return
        for number in range(state["round"]):
            self._collector.release(self._folder(number))
        self._policies.release(before=state["round"])

    def finish(self) -> None:
        """Show the final policy as the last frame of the preview strip."""
        if world.is_main() and self._preview is not None:
            self._preview.add(self._number + 1, self.model, last=True)
        world.wait()

    def __iter__(self) -> Iterator[Any]:
        while True:
            folder = self._folder(self._number)
            summary = self._ready(folder) if self._samples == 0 else self._resumed(folder)
            self._figures = summary.summary
            self._policies.refer(self.model, self._number)
            for batch in self._collector.batches(self._number, folder, self._samples):
                self._samples = self._run.layout.seen_after(self._samples)
                yield batch
            self._count_empty(summary)
            self._number, self._samples = self._number + 1, 0

    def _folder(self, number: int) -> Path:
        return self._run.folder / f"round-{number:04d}"

    def _ready(self, folder: Path) -> RoundSummary:
        """The round, collected with the policy as it is: now, or by a run that was killed."""
        settings = f"{self._run.settings}\0{self._collector.fingerprint()}"
        # Both as the main rank has them: it alone makes and removes folders.
        digest, record = world.gather(
            (_digest(self.model, settings), _read(_Round, folder / _RECORD))
        )[0]
        if record is None or record.policy != digest:
            record = self._collect(folder, digest)
        self._policy = digest
        summary = record.harvest
        for reason, count in summary.skipped.items():
            self._skipped[reason] = self._skipped.get(reason, 0) + count
        return summary

    def _resumed(self, folder: Path) -> RoundSummary:
        """The round of a checkpoint; the weights have moved on since it was sampled."""
        record = _read(_Round, folder / _RECORD)
        if record is None:
            raise DataError(
                f"{folder}: the checkpoint was written while training on this round, and its "
                f"{_RECORD} is gone or damaged. Resume from another checkpoint, or start afresh"
            )
        if record.policy != self._policy:
            raise DataError(
                f"{folder}: the checkpoint was written while training on this round, which has "
                f"been sampled anew since, by another policy. Resume from an earlier checkpoint"
            )
        return record.harvest

    def _collect(self, folder: Path, digest: str) -> _Round:
        began = time.monotonic()
        self._warm_up()
        if world.is_main():
            self._begin(folder, digest)
        world.wait()
        self._policies.keep(self.model, self._number)
        self._policies.refer(self.model, self._number)
        if world.is_main() and self._preview is not None:
            self._preview.add(self._number, self.model)
        for phase in self._collector.phases(self._number):
            self._work(phase, folder)
        if world.is_main():
            summary = self._collector.summarise_round(self._number, folder)
            record = _Round(round=self._number, policy=digest, harvest=summary)
            with writing(folder):
                write_json(folder / _RECORD, asdict(record))
            self._run.console.print(
                f"[bold]round {self._number}[/bold]  {summary.sentence}  "
                f"({time.monotonic() - began:.0f} s)",
                soft_wrap=True,
            )
        world.wait()
        collected = _read(_Round, folder / _RECORD)
        assert collected is not None
        return collected

    def _warm_up(self) -> None:
        """Find out before hours of sampling whether what comes after it can work."""
        if not self._warm:
            self._collector.warm_up(self.model)
            self._warm = True

    def _begin(self, folder: Path, digest: str) -> None:
        """Keep what an interrupted run of the same policy has already collected, nothing else."""
        started = _read(_Started, folder / _STARTED)
        if started is None or started.policy != digest:
            if folder.exists():
                shutil.rmtree(folder)
            if self._number == 0 and self._preview is not None:
                self._preview.forget()
            with writing(folder):
                write_json(folder / _STARTED, {"policy": digest})

    def _work(self, phase: Phase, folder: Path) -> None:
        mine = share(phase.works, number=world.rank(), of=world.size())
        missing = [work for work in mine if not (folder / work.file).exists()]
        title = f"round {self._number}, {phase.title}"
        count = sum(work.samples for work in missing)
        with progress(self._run.console, title, count, unit=self._unit) as advance:
            for work in missing:
                work.do(self.model, folder)
                advance(work.samples)
        world.wait()

    def _count_empty(self, summary: RoundSummary) -> None:
        self._empty_in_a_row = 0 if summary.micro_batches else self._empty_in_a_row + 1
        if self._empty_in_a_row >= _MOST_EMPTY_ROUNDS:
            raise DataError(
                f"{self._empty_in_a_row} rounds in a row had fewer pairs than one optimiser step "
                f"takes, the last one: {summary.sentence}. Sample more prompts a round, "
                f"lower "
                f"training.samples_per_device or training.accumulation, or ask less of a pair"
            )


@dataclass(frozen=True, kw_only=True)
class _Round:
    """The record of a round."""

    round: int
    policy: str
    """Digest of the policy that sampled it, and of what was done with it."""
    harvest: RoundSummary
    """The summary of the round, under the name that files have for it."""


@dataclass(frozen=True, kw_only=True)
class _Started:
    """The file of a round that was started."""

    policy: str


def _read(cls: type[T], path: Path) -> T | None:
    """The record of a round; None where there is none, or it was damaged: what was
    collected under it is then collected again."""
    if not path.is_file():
        return None
    try:
        return checked(cls, read_json(path), path)
    except DataError:
        return None


def _digest(model: AbstractTrainable, settings: str) -> str:
    """Tells a policy, and what is done with it, from every other one."""
    digest = hashlib.blake2b(f"{model.fingerprint()}\0{settings}".encode(), digest_size=16)
    for name, parameter in model.trained_parameters():
        digest.update(name.encode())
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
