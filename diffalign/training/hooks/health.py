"""Watches the figures of a run, says once in plain words what goes wrong, and acts as asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from rich.markup import escape
from torch import Tensor

from diffalign.objectives.base import Measure
from diffalign.training.health_record import Record
from diffalign.training.hooks.base import AbstractHook, TrainingRun
from diffalign.training.hooks.records import JsonLines
from diffalign.training.verdicts import Verdict, verdicts_on

HEALTH = "health.jsonl"
"""File of a run folder: every verdict, with the step at which it was reached."""
BACK_OFF = 0.5
"""Factor of the learning rate at a verdict, of `back_off`."""
MOST_BACK_OFFS = 4
"""How often: a sixteenth of the learning rate is no run of the config that was written any more."""

HealthAction = Literal["warn", "stop", "back_off"]
"""What follows from a verdict."""


class Health(AbstractHook):
    """Comes to verdicts on a run; see docs/health.md.

    A verdict is printed once, stays in `health.jsonl`, and is a figure `health/NAME` of every row
    for which it holds. All that it is based on lies in checkpoints: a run that is resumed comes to
    the same verdicts at the same steps.
    """

    group: ClassVar[str] = "health"

    def __init__(
        self,
        action: HealthAction,
        measure: Measure,
        output: Path,
        *,
        clip: float | None = None,
    ) -> None:
        """
        Args:
            action: what follows from a verdict: `warn` says it; `stop` ends the run; `back_off`
                halves the learning rate where a lower one is what the verdict advises.
            measure: of the likelihood.
            output: the run folder.
            clip: range of the objective, where it has one.
        """
        self._action = action
        self._file = JsonLines(output / HEALTH)
        self._record = Record(measure=measure, clip=clip)
        self._told: dict[str, int] = {}
        self._back_offs = 0

    def start(self, run: TrainingRun) -> Mapping[str, float]:
        if run.accelerator.is_main_process:
            self._file.truncate_after(run.step or -1)
        return {}

    def add_to_row(self, run: TrainingRun, row: Mapping[str, float]) -> Mapping[str, float]:
        self._record = self._record.after(row)
        if "loss" not in row:
            return {}
        found = verdicts_on(self._record)
        for verdict in found:
            self._act(run, verdict)
        return {f"health/{verdict.name}": 1.0 for verdict in found}

    def _act(self, run: TrainingRun, verdict: Verdict) -> None:
        """Say it, unless it was said already and nothing more is done about it."""
        done = ""
        if self._action == "stop":
            run.ask_to_stop(f"{verdict.name}: {verdict.sentence}")
        elif self._backs_off(verdict):
            run.scale_learning_rate(BACK_OFF)
            self._back_offs += 1
            self._record = self._record.afresh()
            done = f" The learning rate is {BACK_OFF:g} times what it was from here on."
        if verdict.name in self._told and not done:
            return
        self._told[verdict.name] = run.step
        said = f"health, step {run.step}: {verdict.name}: {verdict.sentence}{done}"
        run.console.print(f"[yellow]{escape(said)}", highlight=False, soft_wrap=True)
        if run.accelerator.is_main_process:
            line = {"step": run.step, "verdict": verdict.name, "says": verdict.sentence + done}
            self._file.write({**line, "figures": dict(verdict.figures)})

    def _backs_off(self, verdict: Verdict) -> bool:
        """Whether the learning rate is lowered; once a logging interval, for it starts afresh."""
        again = self._back_offs < MOST_BACK_OFFS and not self._record.is_fresh
        return self._action == "back_off" and verdict.lower_rate and again

    def end(self, run: TrainingRun) -> None:
        if run.step == run.optimizer_steps:
            told = ", ".join(f"{name} (step {step})" for name, step in self._told.items())
            said = f"{told}: see {HEALTH}" if told else self._record.describe()
            run.console.print(f"health: {said}", highlight=False, soft_wrap=True)

    def state_dict(self) -> dict[str, Tensor]:
        told = {f"told/{name}": torch.tensor(step) for name, step in self._told.items()}
        return {
            "back_offs": torch.tensor(self._back_offs),
            **told,
            **self._record.as_tensors(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._told = {
            name.removeprefix("told/"): int(step)
            for name, step in state.items()
            if name.startswith("told/")
        }
        self._back_offs = int(state.get("back_offs", 0))
        record = self._record
        self._record = Record.from_tensors(state, measure=record.measure, clip=record.clip)
