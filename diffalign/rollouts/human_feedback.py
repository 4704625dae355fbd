"""D3PO with people: they ranked groups of images, and every step of every decided pair trains.

`diffalign generate` with a `trajectories` section samples the groups, see `rollouts.groups`; a file
of preferences comes back, see `rollouts.preferences`. Nothing is sampled here: a round is one pass
over all pairs, each in an order of its own. As the authors do, train for a while, sample new groups
with the result, have them ranked, and go on from there (`model.path`, or `model.lora.start`).

Source: Yang et al. 2023, arXiv:2311.13231, as in scripts/sample.py and scripts/train.py of
yk7333/d3po.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffalign.config import MAY_CHANGE
from diffalign.data.batches import StepBatch
from diffalign.data.source import AbstractSource
from diffalign.errors import DataError
from diffalign.files import inside
from diffalign.imaging.grid import evenly_spaced
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.rollouts.base import (
    Phase,
    RoundSummary,
    RunContext,
)
from diffalign.rollouts.groups import Group, Origin, read_groups, read_origin, refuse_edited
from diffalign.rollouts.pairing import Pairing, RankedGroup, from_best_to_worst, render_ranked_grid
from diffalign.rollouts.preferences import Verdict, read_preferences
from diffalign.rollouts.preview_strip import AbstractImageCollector
from diffalign.rollouts.rounds import Rounds
from diffalign.rollouts.trajectory_pairs import (
    AbstractTrajectoryRollouts,
    PairedSteps,
    TrajectoryPair,
)


@dataclass(frozen=True, kw_only=True)
class HumanFeedback(AbstractTrajectoryRollouts):
    """Passes over pairs that people decided."""

    trajectories: Path = field(metadata=MAY_CHANGE)
    """The folder of the groups, as `diffalign generate` wrote it."""
    preferences: Path = field(metadata=MAY_CHANGE)
    """A file of JSON lines: `{"group": ID, "ranking": [best, ..., worst]}` with a list of its own
    for images that tie, or `{"group": ID, "good": [...], "bad": [...]}`; or D3PO's own file, one
    JSON list with a list of numbers for each group, the larger the better."""

    def open(self, run: RunContext) -> AbstractSource:
        return Rounds(self, _Collector(self, run), run)

    def describe(self) -> str:
        return f"passes over the preferences in {self.preferences} on {self.trajectories}"


class _Collector(AbstractImageCollector):
    def __init__(self, settings: HumanFeedback, run: RunContext) -> None:
        self._settings = settings
        self._steps = PairedSteps(run, settings.trained_steps)
        groups = {group.group: group for group in read_groups(settings.trajectories)}
        counts = {name: len(group.images) for name, group in groups.items()}
        self._groups = groups
        self._verdicts = read_preferences(settings.preferences, counts)
        self._decided = {name: v for name, v in self._verdicts.items() if v.decided}
        if not self._decided:
            raise DataError(
                f"{settings.preferences}: decides no pair of the {len(groups)} groups in "
                f"{settings.trajectories} ({_in_words(self._left_out()) or 'it has no line'}): "
                f"there is nothing to learn"
            )
        self._pairs = [
            _pair(groups[name], chosen, rejected)
            for name, verdict in self._decided.items()
            for chosen, rejected in verdict.decided
        ]
        self._origin = Origin.of(run.diffusion, self._steps.process)
        for name in self._decided:
            self._refuse_other_origin(groups[name], run)

    def _refuse_other_origin(self, group: Group, run: RunContext) -> None:
        """Raise DataError unless the steps have the density that training will measure."""
        refuse_edited(self._settings.trajectories, group)
        theirs = read_origin(self._settings.trajectories, group)
        name = theirs.first_difference(self._origin)
        if name is None:
            return
        before, now = getattr(theirs, name), getattr(self._origin, name)
        if name in asdict(self._steps.process):
            difference = f"with {name} {before:g}, and likelihood.process.{name} is {now:g}"
            advice = f"set likelihood.process.{name} to {before:g}"
        elif name == "policy":
            start = run.diffusion.lora and run.diffusion.lora.start
            ours = f"{run.diffusion.path}{f' with the adapter {start}' if start else ''}"
            difference = f"by another model (fingerprint {before}) than {ours} (fingerprint {now})"
            advice = (
                "train the model that sampled it, which generate.yaml next to it names: as "
                "model.path, "
                "and where it is an adapter as model.lora.start"
            )
        else:
            difference = (
                f"under another scheduler: {name} was {before!r}, and of {run.diffusion.path} it "
                f"is {now!r}"
            )
            advice = "give the model the scheduler_config.json that sampled it"
        raise DataError(
            f"{self._settings.trajectories / group.trajectories} was sampled {difference}. A step "
            f"has a density under what sampled it alone: {advice}, or sample the groups anew"
        )

    def _left_out(self) -> dict[str, int]:
        """Groups and preferences that train nothing, by reason."""
        verdicts = self._verdicts.values()
        reasons = {
            "tied pairs": sum(verdict.tied for verdict in verdicts),
            "undecided pairs": sum(verdict.undecided for verdict in verdicts),
            "groups without a decided pair": len(self._verdicts) - len(self._decided),
            "groups without a preference": len(self._groups) - len(self._verdicts),
        }
        return {reason: count for reason, count in reasons.items() if count}

    def describe(self) -> list[str]:
        left_out = _in_words(self._left_out())
        return [
            f"{len(self._pairs):,} decided pairs of {len(self._decided):,} groups"
            f"{f'; left out: {left_out}' if left_out else ''}",
            self._steps.describe(),
        ]

    def fingerprint(self) -> str:
        parts = [asdict(self._origin), [asdict(pair) for pair in self._pairs]]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def preview_prompts(self) -> list[str]:
        prompts = list(dict.fromkeys(self._groups[name].prompt for name in self._decided))
        return evenly_spaced(prompts, self._settings.previewed_prompts)

    def preview_process(self) -> ReverseProcess:
        return self._steps.process

    def phases(self, number: int) -> Iterator[Phase]:
        return iter(())

    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        if number == 0:
            self._render_grid(folder)
        micro_batches = self._steps.micro_batches(number, len(self._pairs))
        steps = self._steps.steps(len(self._pairs))
        trained = self._steps.trained(micro_batches)
        skipped = self._left_out() if number == 0 else {}
        if steps > trained:
            skipped["steps that filled no optimiser step"] = steps - trained
        return RoundSummary(
            micro_batches=micro_batches,
            summary={"pairs": len(self._pairs), "steps": trained, "steps_dropped": steps - trained},
            skipped=skipped,
            sentence=f"{len(self._pairs)} pairs; training on {trained} of {steps} steps",
        )

    def _render_grid(self, folder: Path) -> None:
        """As the preferences were understood; groups of one size are shown."""
        count = len(self._groups[next(iter(self._decided))].images)
        shown = [
            _ranked(self._settings.trajectories, self._groups[name], verdict)
            for name, verdict in self._decided.items()
            if len(self._groups[name].images) == count
        ]
        render_ranked_grid(folder / "grid.png", shown, title="as ranked in the preferences")

    def batches(self, number: int, folder: Path, samples: int) -> Iterator[StepBatch]:
        return self._steps.batches(number, self._pairs, self._settings.trajectories, samples)


def _pair(group: Group, chosen: int, rejected: int) -> TrajectoryPair:
    return TrajectoryPair(
        pair_id=f"{group.group}/{chosen}-over-{rejected}",
        prompt=group.prompt,
        file=group.trajectories,
        trajectories=len(group.images),
        chosen=chosen,
        rejected=rejected,
    )


def _ranked(folder: Path, group: Group, verdict: Verdict) -> RankedGroup:
    images = range(len(group.images))
    pairing = Pairing(verdict.decided, verdict.tied, verdict.undecided)
    files = [inside(folder, group.images[i]) for i in from_best_to_worst(pairing, images)]
    return RankedGroup(prompt=group.prompt, files=files, scores=[None] * len(files))


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())
