"""Between logging intervals a step reads nothing back from the device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import config
from diffalign.data.batches import ImageBatch
from diffalign.training import build
from diffalign.training.config import RunConfig
from tests.training.test_build import SMOKE
from tests.training.toys import ToySource, toy_trainer

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,  # item, tolist, bool, float, int
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
"""Operators whose result, or its shape, the host has to know of the device."""


class Operators(TorchDispatchMode):
    """Notes what of them is called, wherever it is called from."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        boolean = function is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function in READING or boolean:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Notes what is read of a tensor on the CPU without an operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def readings():
    """Within this context, what would make the host wait if tensors were on a GPU."""
    found: list[str] = []
    with Operators(found), Lists(found):
        yield found


def readings_by_step(trainer):
    """Let it train: what each step read, by number."""
    found = {}
    train_step = trainer._train_step

    def watched(*arguments):
        with readings() as read:
            stop = train_step(*arguments)
        found[trainer.step] = read
        return stop

    trainer._train_step = watched
    trainer.fit()
    return found


class Pairs(ToySource):
    """The same two pairs for ever."""

    batch_type = ImageBatch

    def __init__(self, make_pairs):
        super().__init__(per_device=2)
        self.pairs = make_pairs("a", "b")

    def __iter__(self):
        while True:
            yield self.pairs

    def fingerprint(self):
        return "two pairs"


def image_trainer(path, output, make_pairs, *overrides: str):
    """A run on pairs that are at hand, so that only the step itself can read anything."""
    run = config.load(
        RunConfig,
        SMOKE,
        [
            *(f"model.path={path}", f"output={output}", "training.optimizer_steps=7"),
            *("training.log_every=3", "training.checkpoint_every=100", *overrides),
        ],
    )

    source = Pairs(make_pairs)
    output.mkdir()
    return build.build_trainer(run, build.build_accelerator(run), source, Console(quiet=True))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_reads_at_the_end_of_an_interval_alone(tmp_path, ema_decay, accumulation):
    trainer = toy_trainer(
        tmp_path,
        **{"optimizer_steps": 7, "log_every": 3, "ema_decay": ema_decay},
        accumulation=accumulation,
        poisoned=frozenset({9}),
    )
    found = readings_by_step(trainer)
    assert [step for step, read in found.items() if read] == [3, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.lora=null", "training.ema_decay=0.9"),
        ("likelihood={kind: denoising, safeguard: 0.9}", "training.accumulation=2"),
    ],
    ids=["lora", "full", "safeguard"],
)
def test_a_step_on_images_reads_at_the_end_of_an_interval_alone(
    tiny_sdxl, tmp_path, make_pairs, overrides
):
    trainer = image_trainer(tiny_sdxl, tmp_path / "run", make_pairs, *overrides)
    found = readings_by_step(trainer)
    assert [step for step, read in found.items() if read] == [3, 6, 7]


def test_a_reading_is_noticed():
    values = torch.arange(3)
    with readings() as read:
        values[values > 1]
        bool(values.sum())
        values.tolist()
    assert read == ["aten.index.Tensor", "aten._local_scalar_dense.default", "tolist"]


@contextmanager
def waiting_is_an_error():
    """Within this context torch refuses whatever makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("overrides", [(), ("model.lora=null", "training.ema_decay=0.9")])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_step_on_a_gpu_never_waits_for_it(tiny_sdxl, tmp_path, make_pairs, overrides, precision):
    trainer = image_trainer(
        *(tiny_sdxl, tmp_path / "run", make_pairs, f"training.precision={precision}"), *overrides
    )
    train_step = trainer._train_step

    def watched(*arguments):
        if trainer.step in (0, 2, 5, 6):  # the first makes the optimiser's state; others log
            return train_step(*arguments)
        with waiting_is_an_error():
            return train_step(*arguments)

    trainer._train_step = watched
    assert trainer.fit()
