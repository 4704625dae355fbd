"""Run by `test_ranks.py` in each of two processes: train the toy, compare the ranks."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

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


build.end(train(Path(sys.argv[1])))
