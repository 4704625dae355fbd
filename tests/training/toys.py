"""The smallest honest model, source and likelihood: a linear score of vectors, without images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from diffalign import world
from diffalign.data.source import AbstractSource
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractTrainable
from diffalign.objectives.base import AbstractObjective, Measure
from diffalign.objectives.dpo import DPO
from diffalign.seeding import cpu_generator, derive_seed
from diffalign.training.hooks.base import AbstractHook
from diffalign.training.optimizers.adamw import AdamW
from diffalign.training.optimizers.base import AbstractOptimizer
from diffalign.training.trainer import Trainer, TrainingConfig


@dataclass
class ToyBatch:
    sample_ids: tuple[str, ...]
    chosen: torch.Tensor
    rejected: torch.Tensor
    strength: dict[str, torch.Tensor] = field(default_factory=dict)


class ToySource(AbstractSource):
    """Random vectors by sample number; a rank takes its slice of each global micro-batch."""

    batch_type = ToyBatch
    views = frozenset({"chosen", "rejected"})

    def __init__(self, per_device: int, poisoned: frozenset[int] = frozenset()) -> None:
        self.per_device, self.poisoned, self.position = per_device, poisoned, 0

    def describe(self):
        return ["toy vectors"]

    def describe_end(self):
        return []

    def __iter__(self):
        while True:
            start = self.position * self.per_device * world.size() + world.rank() * self.per_device
            numbers = range(start, start + self.per_device)
            self.position += 1
            yield self.batch(numbers)

    def batch(self, numbers) -> ToyBatch:
        """The samples of these numbers, whatever the position."""
        rows = torch.stack([self._row(number) for number in numbers])
        return ToyBatch(tuple(f"toy-{n}" for n in numbers), rows[:, 0], rows[:, 1])

    def _row(self, number: int) -> torch.Tensor:
        row = torch.randn(2, 6, generator=cpu_generator(derive_seed("toy", number)))
        return row * float("nan") if number in self.poisoned else row

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    @property
    def left_out_counts(self):
        return {}

    @property
    def skipped_counts(self):
        return {}


class ToyHeldOut:
    """Four batches of two samples beyond those of a run, two samples of each prompt."""

    def share_of_rank(self, *, pairs: int, visits: int):
        source = ToySource(2)
        parts = [range(1000 + 2 * n, 1002 + 2 * n) for n in range(4)]
        return map(source.batch, parts[world.rank() :: world.size()])

    def group(self, sample_id: str) -> str:
        return str(int(sample_id.removeprefix("toy-")) % 4)


class ToyModel(AbstractTrainable):
    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        # No last bias: it cancels in every margin, and Adam would magnify its rounding noise.
        self.network = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1, bias=False)
        )
        self.inner = self.network
        self.frozen = None

    @contextmanager
    def reference(self):
        self.frozen = torch.zeros(())
        try:
            yield
        finally:
            self.frozen = None

    def trained_parameters(self):
        return iter(self.inner.named_parameters())

    def fingerprint(self):
        return "toy"

    def export(self, folder: Path, state=None):
        folder.mkdir(parents=True, exist_ok=True)
        values = dict(self.trained_parameters()) if state is None else state
        save_file({name: value.detach() for name, value in values.items()}, folder / "weights")


@dataclass(frozen=True, kw_only=True)
class ToyLikelihood(AbstractLikelihood):
    batch_type: ClassVar[type] = ToyBatch
    measures: ClassVar[Measure] = "token log-probability"

    def describe(self):
        return "a linear score"

    def check(self, model):
        pass

    def prepare(self, model, batch):
        return batch

    def evaluate(self, model, prepared):
        rows = torch.cat([prepared.chosen, prepared.rejected])
        if model.frozen is not None:
            scores = torch.full((len(rows),), -1.0)
        else:
            scores = model.network(rows).squeeze(-1) - 1  # log-probabilities, mostly
        chosen, rejected = scores.chunk(2)
        return {"chosen": chosen, "rejected": rejected}

    def row_metadata(self, prepared):
        """Rows of 1 to 9 tokens."""
        lengths = {side: getattr(prepared, side)[:, 0] for side in ("chosen", "rejected")}
        return {
            side: {"length": 1 + (4 * values.abs().nan_to_num()).round().clamp(max=8)}
            for side, values in lengths.items()
        }


def toy_trainer(
    output: Path,
    *,
    per_device: int = 4,
    poisoned: frozenset[int] = frozenset(),
    dropout: float = 0.0,
    lr: float = 1e-2,
    identity: dict | None = None,
    objective: AbstractObjective | None = None,
    max_grad_norm: float | None = 1.0,
    schedule: str = "constant",
    optimizer: AbstractOptimizer | None = None,
    hooks: Sequence[AbstractHook] = (),
    **training,
) -> Trainer:
    output.mkdir(parents=True, exist_ok=True)
    settings = {"optimizer_steps": 6, "log_every": 2, "checkpoint_every": 100, **training}
    config = TrainingConfig(samples_per_device=per_device, **settings)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulation, sync_with_dataloader=False, adjust_scheduler=False
        ),
    )
    return Trainer(
        accelerator=accelerator,
        model=ToyModel(dropout),
        source=ToySource(per_device, poisoned),
        likelihood=ToyLikelihood(),
        objective=objective or DPO(beta=1.0),
        optimizer=optimizer or AdamW(lr=lr, max_grad_norm=max_grad_norm, schedule=schedule),
        training=config,
        identity=identity or {"seed": 0},
        output=output,
        console=Console(quiet=not accelerator.is_main_process),
        hooks=hooks,
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters])
