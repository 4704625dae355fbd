"""Run by `test_ranks.py` in each of two processes: train the toy, compare the ranks."""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from diffalign import world
from diffalign.objectives.aot import AOT
from diffalign.objectives.base import Likelihoods
from diffalign.training import build
from tests.training.toys import toy_trainer, weights


def train(folder: Path) -> Accelerator:
    """Train on this rank; the main one compares all."""
    trainer = toy_trainer(folder, per_device=2, optimizer_steps=5, accumulation=2)
    batches = iter(trainer.source)
    ids = next(batches).sample_ids
    trainer.source.position = 0
    trainer.fit()
    mine = weights(trainer).tolist()
    everyone = gather_object([(ids, mine)])
    if trainer.accelerator.is_main_process:
        (ids_0, weights_0), (ids_1, weights_1) = everyone
        assert not set(ids_0) & set(ids_1), "both ranks trained on the same samples"
        assert weights_0 == weights_1, "the ranks drifted apart"
        assert torch.tensor(weights_0).isfinite().all()
        print("equal weights from different samples")
    return trainer.accelerator


def train_with_a_bad_rank(folder: Path) -> None:
    """One sample of one rank is not finite: neither rank moves, and both know it."""
    settings = {"per_device": 2, "ema_decay": 0.5}
    bad = frozenset({10})  # of the third step, on rank 1
    trainer = toy_trainer(folder / "bad", poisoned=bad, optimizer_steps=3, log_every=3, **settings)
    trainer.fit()
    clean = toy_trainer(folder / "clean", optimizer_steps=2, log_every=2, **settings)
    clean.fit()
    assert torch.equal(weights(trainer), weights(clean))
    for name, value in clean.average.state_dict().items():
        assert torch.equal(trainer.average.state_dict()[name], value)
    assert (trainer.bad_steps.in_all, trainer.bad_steps.in_a_row) == (1, 1)
    print("neither rank took the bad step")


def stop_by_one_rank(folder: Path) -> None:
    """A signal to one rank stops both after the same step."""
    trainer = toy_trainer(folder / "stopped", per_device=2, optimizer_steps=50)
    evaluate = trainer._evaluate

    def interrupted(part, totals):
        if trainer.step == 3 and world.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(part, totals)

    trainer._evaluate = interrupted
    assert not trainer.fit()
    steps = world.gather(trainer.step)
    assert steps == [4, 4], steps
    print("both ranks stopped after the same step")


def sort_over_both_ranks(device: torch.device) -> None:
    """A loss of ranks sees the rows of both processes: their mean is the loss of all four pairs."""
    sides = {"chosen": [0.5, -1.0, 2.0, 0.0], "rejected": [0.1, 0.3, -0.7, 1.0]}
    reference = torch.tensor([0.2, -0.4, 0.9, 0.4], device=device)
    objective = AOT(beta=1.0)

    def loss(rows: slice) -> float:
        views = {
            side: Likelihoods(
                torch.tensor(values, device=device)[rows],
                (reference if side == "chosen" else -reference)[rows],
            )
            for side, values in sides.items()
        }
        return objective(views).loss.mean().item()

    mine = loss(slice(2 * world.rank(), 2 * world.rank() + 2))
    both = sum(world.gather(mine)) / 2
    policy = torch.tensor(sides["chosen"]) - torch.tensor(sides["rejected"])
    gaps = policy.sort().values - (2 * reference.cpu()).sort().values
    expected = -torch.nn.functional.logsigmoid(gaps).mean().item()
    assert abs(both - expected) < 1e-6, (both, expected)
    print("pairs were sorted over both ranks")


accelerator = train(Path(sys.argv[1]))
train_with_a_bad_rank(Path(sys.argv[1]))
stop_by_one_rank(Path(sys.argv[1]))
sort_over_both_ranks(accelerator.device)
build.end(accelerator)
