"""The loop: one for every method, family and source.

It knows neither the model nor the loss. A step is `accumulation` micro-batches, each evaluated by
the reference without gradient and by the policy with it, through the same code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.optim import AdamW

from diffalign import world
from diffalign.cache.references import CachedReference
from diffalign.data.layout import Layout
from diffalign.data.source import AbstractSource
from diffalign.errors import CheckpointError, TrainingError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import send
from diffalign.models.sharding import gathered, is_sharded
from diffalign.objectives.base import AbstractObjective, Likelihoods, LossOutput, StepTotals
from diffalign.training.bad_steps import BadSteps
from diffalign.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from diffalign.training.config import TrainingConfig
from diffalign.training.figures import Figure, length_figures, margin_figures, model_figures
from diffalign.training.hooks.base import AbstractHook, Hooks, StepOutcome
from diffalign.training.hooks.records import Records
from diffalign.training.hooks.weight_average import AverageOfOptimizer, WeightAverage
from diffalign.training.interruption import Interruption
from diffalign.training.look_ahead import MicroBatch, totals_of_step, views_of
from diffalign.training.metrics import Metrics
from diffalign.training.optimizers.base import (
    AbstractOptimizer,
    build_schedule,
    parameter_groups,
    skips_on_device,
    step_where,
)
from diffalign.training.run_state import capture, refuse_other_run, restore


class Trainer:
    """Runs the steps of one run and owns everything that a checkpoint holds."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: AbstractTrainable,
        source: AbstractSource,
        likelihood: AbstractLikelihood,
        objective: AbstractObjective,
        precomputed_reference: CachedReference | None = None,
        optimizer: AbstractOptimizer,
        training: TrainingConfig,
        layout: Layout | None = None,
        identity: Mapping[str, Any],
        output: Path,
        console: Console,
        hooks: Sequence[AbstractHook] = (),
    ) -> None:
        """Assemble a run.

        Args:
            accelerator: made with this run's precision and accumulation.
            model: loaded, on the accelerator's device.
            source: of batches that `likelihood` takes and that offer `objective.views`.
            likelihood, objective, optimizer, training: the sections of the config.
            precomputed_reference: the reference's values, where they were computed before; None
                runs the reference that the model was loaded with.
            layout: how the samples of a step are shared among the processes; None is that of a run
                which starts on these.
            identity: what two runs must share for a checkpoint of one to serve the other.
            output: the run folder.
            console: silent on all ranks but the main one.
            hooks: what looks at the run besides its records and the weight average.
        """
        assert source.batch_type is likelihood.batch_type, "the config was checked"
        read = objective.views & likelihood.data_views(objective.views)  # others it makes itself
        assert read <= source.views, "the config was checked"
        self.accelerator, self.model, self.source = accelerator, model, source
        self.likelihood, self.objective = likelihood, objective
        self.precomputed_reference = precomputed_reference
        self.config, self.identity, self.output = training, identity, output
        self.layout = layout or Layout.start(
            samples_per_device=training.samples_per_device, accumulation=training.accumulation
        )
        accelerator.gradient_accumulation_steps = self.layout.accumulation
        self.console = console
        self.max_grad_norm = optimizer.max_grad_norm or float("inf")

        self.parameters = [parameter for _, parameter in model.trained_parameters()]
        groups = parameter_groups(model.trained_parameters(), model.learning_rates())
        raw_optimizer = optimizer.build(groups)
        self.schedule = build_schedule(
            optimizer, raw_optimizer, optimizer_steps=training.optimizer_steps
        )
        self.average: WeightAverage | AverageOfOptimizer | None = None
        if training.ema_decay is not None:
            self.average = WeightAverage(model.trained_parameters(), decay=training.ema_decay)
        elif optimizer.averages:
            self.average = AverageOfOptimizer(
                model.trained_parameters(), partial(optimizer.averaged, raw_optimizer)
            )
        self.optimizer_figures = partial(optimizer.figures, raw_optimizer)
        self.named_parameters = dict(model.trained_parameters())
        if any(map(is_sharded, self.parameters)):  # whose network is as accelerate would make it
            self.optimizer = accelerator.prepare_optimizer(raw_optimizer)
        else:
            model.network, self.optimizer = accelerator.prepare(model.network, raw_optimizer)
        source.bind(model)
        self.positions: deque[Mapping[str, Any]] = deque(maxlen=training.keep_checkpoints)

        self.step = 0
        self.lr = 0.0
        self.stopped_for = ""
        self.bad_steps = BadSteps()
        self.metrics = Metrics()
        average = [] if self.average is None else [self.average]
        self.hooks = Hooks([*average, *hooks, Records(output, console)])

    @property
    def optimizer_steps(self) -> int:
        """Those of the whole run."""
        return self.config.optimizer_steps

    @property
    def samples_per_step(self) -> int:
        """The effective batch: samples over all devices and micro-batches of a step."""
        return self.layout.samples_per_step

    @property
    def least_checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk at least: trained weights, their average, and the
        state of an optimiser that is known to keep two values for each."""
        copies = 1 + (self.average is not None) + 2 * isinstance(self.optimizer.optimizer, AdamW)
        return copies * sum(parameter.nbytes for parameter in self.parameters)

    def fit(self) -> bool:
        """Train to the last step, or until a signal or a hook asks to stop.

        Returns:
            Whether the run is complete; if not, it was saved and can be resumed, and `stopped_for`
            is the reason of the hook that asked.

        Raises:
            TrainingError: too many steps in a row were not finite.
            CheckpointError: the last checkpoint could not be written.
        """
        batches = iter(self.source)
        with Interruption() as interruption:
            try:
                self._record(self.hooks.start(self))
                while self.step < self.config.optimizer_steps:
                    if self._train_step(batches, interruption):
                        break
            finally:
                self.hooks.end(self)
        if complete := self.step == self.config.optimizer_steps:
            self.source.finish()
        return complete

    def _train_step(self, batches: Iterator[Any], interruption: Interruption) -> bool:
        """One optimiser step and what follows it; returns whether the run was asked to stop."""
        sample_ids: list[str] = []
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        parts, totals = self._micro_batches(batches)
        for part in parts:
            sample_ids.extend(part.batch.sample_ids)
            with self.accelerator.accumulate(self.model.network):
                output, figures = self._evaluate(part, totals)
                self.accelerator.backward(output.loss.mean())
            finite &= output.loss.detach().isfinite().all()
            self.metrics.add({"loss": output.loss, **output.metrics, **figures})
        grad_norm: Any = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        grad_norm = grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm
        self.metrics.add({"grad_norm": grad_norm})
        good = world.total((~(finite & grad_norm.isfinite())).float()) == 0

        stop = interruption.agreed()
        self._update(good)
        self.lr = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.step += 1
        self.metrics.commit(good)
        self.bad_steps.note(self.step, good, sample_ids)
        self._after_step(good, stop=stop)
        return stop or bool(self.stopped_for)

    def _update(self, good: Tensor) -> None:
        """Move the weights if loss and gradient were finite on every rank.

        Args:
            good: whether they were, a bool scalar on the device.
        """
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # the loss scaler of fp16 skips by itself, and shrinks
        elif skips_on_device(self.optimizer.optimizer):
            with step_where(self.optimizer.optimizer, good):
                self.optimizer.step()
        elif good:  # a read-back in every step: the host has to skip what the optimiser cannot
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _after_step(self, good: Tensor, *, stop: bool) -> None:
        """Hooks look, figures are written, and the run is saved, as each of them is due."""
        complete = self.step == self.config.optimizer_steps
        last = stop or complete
        logs = complete or self.step % self.config.log_every == 0
        saves = last or self.step % self.config.checkpoint_every == 0
        if logs or saves:
            self._tell_bad_steps()
            said = [remark for some in world.gather(self.model.remarks()) for remark in some]
            for remark in dict.fromkeys(said):
                self.console.print(f"[yellow]{escape(remark)}", soft_wrap=True)
        figures = self.hooks.after_step(self, StepOutcome(moved=good, complete=complete))
        if logs:
            figures = {**self._means(), **figures}
        self._record(figures)
        last |= bool(self.stopped_for)
        if saves or last:
            self._save(must_succeed=last or not self.positions)

    def _micro_batches(
        self, batches: Iterator[Any]
    ) -> tuple[Iterable[MicroBatch], Mapping[str, StepTotals]]:
        """The parts of a step, and what the loss must know of all of them before any is done."""
        count, known = self.layout.accumulation, self.objective.must_know
        if count == 1 or known == "nothing":
            return (MicroBatch(next(batches)) for _ in range(count)), {}
        parts = [MicroBatch(next(batches)) for _ in range(count)]
        totals = totals_of_step(
            parts,
            step=self.step,
            views=self.objective.views,
            likelihood=self.likelihood,
            model=self.model,
            reference=None if known == "counts" else self._reference,
            every_row=known == "every_row",
        )
        return parts, totals

    def _evaluate(
        self, part: MicroBatch, totals: Mapping[str, StepTotals]
    ) -> tuple[LossOutput, dict[str, Figure]]:
        """The loss of a micro-batch, and further figures for the log."""
        views = self.views(part, totals)
        output = self.objective(views)
        figures = {
            **margin_figures(output.metrics, self.likelihood.noise(self.model, part.batch)),
            **model_figures(views, self.likelihood.measures),
            **length_figures(views),
            **part.figures,
        }
        return output, figures

    def views(
        self, part: MicroBatch, totals: Mapping[str, StepTotals] | None = None
    ) -> dict[str, Likelihoods]:
        """Reference first, then policy, on one prepared batch.

        Args:
            part: what is known of it is not computed again.
            totals: of the optimiser step by view; none where the batch is all there is.
        """
        if part.prepared is None:
            part.prepared = self.likelihood.prepare(self.model, part.batch)
        if part.reference is None:
            part.reference = self._reference(part)
        policy = self.likelihood.evaluate(self.model, part.prepared)
        views = views_of(
            policy,
            part.reference,
            self.likelihood.row_metadata(part.prepared),
            totals or {},
            part.batch.strength,
            self.likelihood.token_likelihoods(part.prepared),
        )
        part.figures = self.likelihood.figures(part.prepared)
        part.prepared = None  # of a step whose parts are all at hand
        return views

    def _reference(self, part: MicroBatch) -> Mapping[str, Tensor]:
        if not self.objective.needs_reference:
            return {}
        if self.precomputed_reference is not None:
            found = self.precomputed_reference(part.batch.sample_ids, part.batch.visits)
            return {view: send(values, self.accelerator.device) for view, values in found.items()}
        with torch.no_grad(), self.model.reference():
            return self.likelihood.evaluate(self.model, part.prepared)

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """See `TrainingRun`: the average of an optimiser that keeps one, and else what trains."""
        average = self.average
        return average.in_network() if isinstance(average, AverageOfOptimizer) else nullcontext()

    def ask_to_stop(self, reason: str) -> None:
        """See `TrainingRun`."""
        self.stopped_for = reason

    def scale_learning_rate(self, factor: float) -> None:
        """See `TrainingRun`. The schedule is part of a checkpoint, and goes on from there."""
        schedule = self.schedule
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
        schedule._last_lr = [rate * factor for rate in schedule.get_last_lr()]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _tell_bad_steps(self) -> None:
        """Say which of the steps since the last time were not finite; stop after too many in a row.

        Every rank comes here at the same steps, and waits for its device.
        """
        for bad in self.bad_steps.read():
            samples = [name for names in world.gather(bad.sample_ids) for name in names]
            reason = next((said for said in world.gather(self.model.blame()) if said), None)
            self.console.print(
                f"[yellow]step {bad.step}: loss or gradient not finite, weights left as they were "
                f"({bad.in_a_row} in a row, {bad.in_all} in all; samples "
                f"{escape(_first_few(samples))})" + (f": {escape(reason)}" if reason else ""),
                soft_wrap=True,
            )
            if bad.in_a_row >= self.config.max_bad_steps:
                self._give_up(bad.in_a_row, samples, reason)

    def _give_up(self, in_a_row: int, samples: list[str], reason: str | None) -> NoReturn:
        kept = checkpoints_in(self.output)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint exists yet"
        raise TrainingError(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite "
            f"(training.max_bad_steps); {good}. The last of them held the samples "
            f"{', '.join(samples)}. "
            + (reason or "Lower optimizer.lr, or use precision bf16 or float32")
        )

    def _record(self, figures: Mapping[str, float]) -> None:
        if figures:
            samples = self.step * self.samples_per_step
            row = {"step": self.step, "samples": samples, **figures}
            self.hooks.after_log(self, {**row, **self.hooks.add_to_row(self, row)})

    def _means(self) -> dict[str, float]:
        """The figures of a logging interval, which ends."""
        return {
            **self.metrics.reduce(),
            **self.source.figures(),
            "lr": self.lr,
            **self.optimizer_figures(),
            "bad_steps": self.bad_steps.in_all,
        }

    def _save(self, *, must_succeed: bool) -> None:
        """Save. A run whose first checkpoint fails would end with nothing and stops; a later one
        that fails is reported, and the run goes on: room may be made."""
        captured = capture(self)
        try:
            save_checkpoint(self.output, captured, keep=self.config.keep_checkpoints)
        except CheckpointError as error:
            if must_succeed:
                raise
            self.console.print(
                f"[red]{escape(str(error))}. The run goes on", highlight=False, soft_wrap=True
            )
            return
        self.positions.append(captured.state["source"])
        if len(self.positions) == self.config.keep_checkpoints:
            self.source.release(self.positions[0])  # no kept checkpoint is before it

    def resume(self, path: Path, *, verified: bool = False) -> None:
        """Continue exactly where a checkpoint of the same run was written.

        Args:
            path: its folder.
            verified: one rank has just verified it for all.

        Raises:
            CheckpointError: it is damaged, or another run's; the first differing key is named.
        """
        saved = load_checkpoint(path, verified=verified, like=self._shared_out_as)
        refuse_other_run(path, saved.state["identity"], self.identity)
        restore(self, saved)

    def _shared_out_as(self, group: str, name: str) -> Tensor | None:
        """The parameter as which a tensor of a checkpoint is shared out, if any is."""
        if group == "optimizer":
            parameter = self.parameters[int(name.partition(".")[0])]
        elif group in ("weights", "average"):
            parameter = self.named_parameters[name]
        else:
            return None
        return parameter if is_sharded(parameter) else None

    def export(self, folder: Path) -> None:
        """Write the result for users: the weight average if there is one, else the weights."""
        state = None if self.average is None else self.average.state_dict()
        if any(map(is_sharded, self.parameters)):
            state = gathered((state or self.named_parameters).items())
        if self.accelerator.is_main_process:
            self.model.export(folder, state)
        self.accelerator.wait_for_everyone()


def _first_few(names: Sequence[str], many: int = 4) -> str:
    rest = f" and {len(names) - many} more" if len(names) > many else ""
    return ", ".join(names[:many]) + rest
