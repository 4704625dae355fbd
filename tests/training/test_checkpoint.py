from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from diffalign.errors import CheckpointError
from diffalign.training import checkpoint
from diffalign.training.checkpoint import Checkpoint


def some(step: int, size: int = 4) -> Checkpoint:
    return Checkpoint(
        step=step, tensors={"weights": {"w": torch.full((size,), step * 1.0)}}, state={"a": [1]}
    )


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, some(7), keep=1)
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.step == 7 and loaded.state == {"a": [1]}
    assert torch.equal(loaded.tensors["weights"]["w"], torch.full((4,), 7.0))


def test_only_the_newest_are_kept_in_numeric_order(tmp_path):
    for step in (8, 9, 10, 11):
        checkpoint.save_checkpoint(tmp_path, some(step), keep=2)
    names = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-11"]


def test_saving_after_going_back_drops_the_steps_that_were_given_up(tmp_path):
    for step in (10, 20):
        checkpoint.save_checkpoint(tmp_path, some(step), keep=2)
    checkpoint.save_checkpoint(tmp_path, some(15), keep=2)
    names = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-15"]


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path):
    """A file-size limit makes the write itself fail, as a full disk does."""
    checkpoint.save_checkpoint(tmp_path, some(1), keep=1)
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from diffalign.errors import CheckpointError\n"
        "from diffalign.training.checkpoint import Checkpoint, save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "big = Checkpoint(step=2, tensors={'weights': {'w': torch.zeros(100_000)}}, state={})\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]), big, keep=1)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "checkpoint-2: the checkpoint could not be written" in result.stdout
    assert "checkpoint-1 is intact" in result.stdout and "MiB are free" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-1").step == 1


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(tmp_path):
    partial = tmp_path / ".checkpoint-3.partial"
    partial.mkdir()
    assert checkpoint.checkpoints_in(tmp_path) == []
    checkpoint.discard_partial(tmp_path)
    assert not partial.exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_one_named(tmp_path):
    checkpoint.save_checkpoint(tmp_path, some(1), keep=2)
    path = checkpoint.save_checkpoint(tmp_path, some(2), keep=2)
    (path / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"damaged.*resume from .*checkpoint-1 instead"):
        checkpoint.load_checkpoint(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no state\.json"):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_an_optimiser_continues_exactly_from_its_packed_state(tmp_path, kind):
    from diffalign.training.optimizers import OptimizerConfig, build_optimizer

    def make():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, build_optimizer(OptimizerConfig(kind=kind, lr=0.1), list(layer.parameters()))

    def step(layer, optimizer):
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer)
    tensors, values = checkpoint.pack_optimizer(optimizer)
    saved = Checkpoint(step=1, tensors={"optimizer": tensors}, state={"optimizer": values})
    loaded = checkpoint.load_checkpoint(checkpoint.save_checkpoint(tmp_path, saved, keep=1))

    other, restored = make()
    other.load_state_dict(layer.state_dict())
    checkpoint.unpack_optimizer(restored, loaded.tensors["optimizer"], loaded.state["optimizer"])
    for _ in range(2):
        step(layer, optimizer)
        step(other, restored)
    assert torch.equal(layer.weight, other.weight)
