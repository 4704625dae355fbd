"""Run by `test_sharding.py` in each of several processes: train in replicas, train in shards,
compare; all cases in one process group, since starting processes takes longer than training."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from diffalign import config, world
from diffalign.errors import CheckpointError
from diffalign.files import read_json_lines
from diffalign.jobs import train
from diffalign.training import checkpoint
from diffalign.training.checkpoint import load_checkpoint
from diffalign.training.config import RunConfig
from tests.runs import forget_accelerate

LOSSES, WEIGHTS = 1e-5, 1e-6
"""How far the figures of shards may be from those of replicas, as rounding goes in float32."""
STEPS = 4


def fit(file: Path, output: Path, *more: str) -> None:
    """One run on all processes."""
    forget_accelerate()
    train.run(config.load(RunConfig, file, [f"output={output}", *more]))


def weights(output: Path, group: str = "weights") -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(output / f"checkpoint-{STEPS}").tensors[group])


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def compare(name: str, folder: Path, *, losses: float, values: float) -> None:
    """Say how far apart the two runs of a case are; fail where that is too far."""
    replicas, shards = (read_json_lines(folder / kind / "metrics.jsonl") for kind in KINDS)
    assert [row["step"] for row in replicas] == [row["step"] for row in shards]
    keys = ("loss", "grad_norm")
    apart = max(
        abs(a[key] - b[key]) / max(1.0, abs(a[key]))
        for a, b in zip(replicas, shards, strict=True)
        for key in keys
        if key in a
    )
    moved = furthest(weights(folder / "none"), weights(folder / "fsdp2"))
    assert apart <= losses, f"{name}: figures differ by {apart}"
    assert moved <= values, f"{name}: weights differ by {moved}"
    assert any((folder / "fsdp2" / f"checkpoint-{STEPS}" / "shards").iterdir())
    print(f"CASE {name}: figures to {apart:.1e}, weights to {moved:.1e}", flush=True)


KINDS = ("none", "fsdp2")


def main(root: Path) -> None:
    Accelerator.end_training = lambda self: None  # the group serves all cases
    for file in sorted(root.glob("*.yaml")):
        folder = root / file.stem
        for kind in KINDS:
            fit(file, folder / kind, f"training.sharding={kind}")
        if world.is_main():
            loose = "bf16" in file.stem
            compare(
                file.stem,
                folder,
                losses=0.1 if loose else LOSSES,
                values=2e-3 if loose else WEIGHTS,
            )
        world.wait()
    refuse_together(file, root / "full")


def refuse_together(file: Path, output: Path) -> None:
    """Where one process cannot write its part, none waits for it, and all say the same."""

    def full(path: Path) -> dict[str, object]:
        if world.rank() == 1 and path.parent.name == checkpoint.SHARDS:
            raise OSError("no space left on device")
        return sealed(path)

    sealed, checkpoint._sealed = checkpoint._sealed, full
    try:
        fit(file, output, "training.sharding=fsdp2")
    except CheckpointError as error:
        assert "no space left on device" in str(error)
    else:
        raise AssertionError("the disk was full")
    finally:
        checkpoint._sealed = sealed
    assert not list(output.glob("*checkpoint-*"))
    print("FULL", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
