"""Whether a run fits a device: its memory by part, what the device offers, and what would save
memory, each computed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from diffalign.cache.encodings import EncodingShapes, EncodingsLayout
from diffalign.data.pairs.encoded import PairsToEncode
from diffalign.errors import ConfigError, ModelError
from diffalign.models.devices import DTYPES
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.simulation import SimulatedDevice
from diffalign.training.config import RunConfig
from diffalign.training.response_memory import longest_sample
from diffalign.training.step_memory import (
    AdvanceWork,
    StepMemory,
    advance_work,
    blank_encodings,
    step_memory,
)

GIB = 2**30

CONTEXT = int(0.75 * GIB)
"""Bytes of a CUDA context, the kernels in it, and the workspaces of cuBLAS and cuDNN: an
assumption, between what cards of the last years show."""
KERNELS = int(0.15 * GIB)
"""Bytes of a process on the CPU that come while it trains, next to its tensors: kernels and their
workspaces. Measured by scripts/bench_plan.py: 0.13 to 0.22 GiB. Freed pages that glibc's allocator
keeps come on top (docs/performance.md)."""
FRAGMENTED = 0.05
"""Share of the peak that CUDA's caching allocator holds besides, in pieces: an assumption."""
USABLE = 0.98
"""Share of the memory in a card's name that it offers: 23.65 GiB of 24, 79.3 of 80."""

ASSUMED_RATE = 50e12
"""Floating-point operations a second of a card that is not here: an assumption, about what an RTX
4090 gives convolutions in half precision. The size of a card's memory does not say its speed."""
ATTAINED = 0.5
"""Share of a matrix product's rate that encoders and networks get: an assumption."""

_SHORTEST = 512
"""Tokens of a row below which no advice goes: an image of 576 and its prompt hardly fit 1024."""

_GPU = re.compile(r"(\d+(?:\.\d+)?) ?gi?b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device that a run should fit."""

    name: str
    rules: SimulatedDevice
    capacity: int
    """Bytes that a process can have."""
    overhead: int
    """Bytes next to tensors: a CUDA context; interpreter and libraries on the CPU."""
    fragmented: float
    """Share of the tensors' peak that the allocator holds besides."""
    rate: Callable[[torch.dtype], float]
    """Floating-point operations a second that encoders and network get of it, in a precision."""


def named_gpu(text: str) -> Target:
    """The card of so many gigabytes, which need not be here.

    Args:
        text: such as `24gb`.

    Raises:
        ConfigError: it names no size.
    """
    found = _GPU.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(
            f"--gpu is {text!r}: give the memory of a card, such as 24gb (8gb, 12gb, 16gb, 24gb, "
            f"48gb, 80gb, or any other size)"
        )
    size = float(found[1])
    return Target(
        name=f"a GPU of {size:g} GB",
        rules="cuda",
        capacity=int(size * USABLE * GIB),
        overhead=CONTEXT,
        fragmented=FRAGMENTED,
        rate=lambda _: ASSUMED_RATE,
    )


def this_machine() -> Target:
    """The device that `train` would take here."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Target(
            name=f"{properties.name}, {properties.total_memory / GIB:.1f} GiB",
            rules="cuda",
            capacity=properties.total_memory,
            overhead=CONTEXT,
            fragmented=FRAGMENTED,
            rate=partial(measured_rate, torch.device("cuda")),
        )
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return Target(
        name=f"this machine's CPU, {total / GIB:.1f} GiB",
        rules="cpu",
        capacity=total,
        overhead=resident() + KERNELS,
        fragmented=0.0,
        rate=partial(measured_rate, torch.device("cpu")),
    )


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a device: `ATTAINED` of those of a matrix product."""
    side = 512 if device.type == "cpu" else 8192  # bf16 without instructions for it takes long
    factor = torch.ones(side, side, device=device, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        (factor @ factor).sum().item()  # reading it back waits for the device
        return time.perf_counter() - started

    seconds()  # the first one chooses kernels
    return ATTAINED * 2 * side**3 / min(seconds() for _ in range(3))


def resident() -> int:
    """Bytes that this process holds: on the CPU, what interpreter and libraries take of a run."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return GIB
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run takes of a device."""

    target: Target
    step: StepMemory
    """By phase and part, in bytes."""

    @property
    def overhead(self) -> int:
        """Bytes next to the tensors."""
        return self.target.overhead + int(self.target.fragmented * self.step.peak)

    @property
    def total(self) -> int:
        """Bytes in all, at the peak."""
        return self.step.peak + self.overhead

    @property
    def free(self) -> int:
        """Bytes that are left; below 0 where the run does not fit."""
        return self.target.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0

    def parts(self) -> Mapping[str, int]:
        """Bytes of each part at the peak, `overhead` last."""
        return {**self.step.parts, "overhead": self.overhead}


def memory_plan(run: RunConfig, target: Target) -> MemoryPlan:
    """Count what a run takes; it reads configurations alone, and takes seconds.

    Raises:
        ConfigError: the run is of a kind that is not planned yet.
    """
    return MemoryPlan(target=target, step=step_memory(run, device=target.rules))


@dataclass(frozen=True, kw_only=True)
class AdvancePlan:
    """What `diffalign precompute` takes for a run: bytes of the disk, and time."""

    image: int
    """Bytes of one image seen in one way."""
    caption: int
    """Bytes of one caption."""
    work: AdvanceWork
    """Operations for one of each."""
    rate: float
    """Operations a second that the device is taken to do."""
    encodings: int | None
    """Bytes of all of them; None where the data is not on this disk."""
    reference: int | None
    """Bytes of the reference's values; None also where data.visits is not given."""
    images: int | None
    """How many are encoded, each way to see one counted; None as for `encodings`."""
    captions: int | None
    """How many are encoded."""
    visits: int
    """Of images by the reference, in all; 0 where its values are not computed."""

    @property
    def seconds(self) -> float | None:
        """Of all of it; None where the data is not on this disk."""
        if self.images is None or self.captions is None:
            return None
        encoding = self.images * self.work.image + self.captions * self.work.caption
        return (encoding + self.visits * self.work.reference) / self.rate


def advance_plan(run: RunConfig, pairs: PairsToEncode | None, target: Target) -> AdvancePlan:
    """Count what the encodings and the reference's values of a run take.

    Args:
        run: that can be planned.
        pairs: of its data; None where that is not at hand.
        target: the device that computes them.
    """
    assert run.data is not None
    blank = blank_encodings(run)
    posterior, prompts = next(iter(blank.posteriors.values())), blank.prompts
    shapes = EncodingShapes(
        factor=blank.size[0] // posterior.shape[-2],
        posterior=cast(AbstractDiffusion, run.model).posterior,
        channels=posterior.shape[1],
        latent_dtype=posterior.dtype,
        prompt={name: tuple(rows.shape[1:]) for name, rows in prompts.items()},
        prompt_dtype=next(iter(prompts.values())).dtype,
    )
    visits = 0
    if pairs is not None and run.objective.needs_reference and run.data.visits is not None:
        visits = run.data.visits * len(pairs) * len(pairs.views)
    return AdvancePlan(
        image=shapes.image_bytes(blank.size),
        caption=shapes.prompt_bytes,
        work=advance_work(run),
        rate=target.rate(DTYPES[run.training.precision]),
        encodings=None if pairs is None else EncodingsLayout(pairs, shapes).bytes,
        reference=visits * torch.float32.itemsize or None,
        images=None
        if pairs is None
        else len(pairs.views) * sum(len(pairs.ways_of(i)) for i in range(len(pairs))),
        captions=None if pairs is None else len(pairs.prompts),
        visits=visits,
    )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change of the config, and what it would save."""

    overrides: tuple[str, ...]
    saves: int
    """Bytes of the peak, by itself."""
    costs: str
    """In words, in time or otherwise."""


Loaded = Callable[[Sequence[str]], RunConfig]
"""The run with further overrides."""


def candidates(run: RunConfig) -> list[tuple[tuple[str, ...], str]]:
    """Changes that may save memory of a run, those first that cost least, and their price."""
    model, training = run.model, run.training
    found: list[tuple[tuple[str, ...], str]] = []
    if training.precision == "float32":
        found.append((("training.precision=bf16",), "rounding"))
    encoders = getattr(model, "encoders", None)
    if encoders == "resident":
        found.append((("model.encoders=offload",), "their way to the device in every step"))
    if encoders in ("resident", "offload"):
        found.append((("model.encoders=cached",), "diffalign precompute before"))
    if getattr(model, "images_per_encoding", 1) > 1 and training.samples_per_device > 0:
        found.append((("model.images_per_encoding=1",), "a little time"))
    if not getattr(model, "gradient_checkpointing", True):
        found.append((("model.gradient_checkpointing=true",), "a third more time"))
    n, tokens = training.samples_per_device, training.tokens_per_device
    if tokens is not None:
        if run.responses is not None and tokens // 2 >= longest_sample(run):
            found.append(((f"training.tokens_per_device={tokens // 2}",), "more forward passes"))
    elif n > 1:
        half = next(d for d in range(n // 2, 0, -1) if n % d == 0)
        changed = (
            f"training.samples_per_device={half}",
            f"training.accumulation={training.accumulation * n // half}",
        )
        found.append((changed, "time, where the device was not full"))
    if run.responses is not None and (half := run.responses.max_length // 2) >= _SHORTEST:
        costs = "pairs that are longer, which are left out"
        found.append(((f"responses.max_length={half}",), costs))
    if not model.trains_adapter:
        found.append((("optimizer.kind=adamw_8bit",), "rounding of the optimiser's state"))
        if run.objective.needs_reference and run.reference != "cached":
            found.append((("reference=cached",), "diffalign precompute before"))
        if run.responses is not None:
            costs = "the same, and time where its pages leave the card"
            found.append((("optimizer.kind=paged_adamw_8bit",), costs))
        found.append((("model.lora={rank: 16}",), "an adapter instead of all weights"))
    elif hasattr(model, "quantization") and model.quantization is None:
        found.append((("model.quantization=8bit",), "time, and rounding of the base"))
        found.append((("model.quantization=4bit",), "time, and more rounding of the base"))
    return found


def advise(plan: MemoryPlan, run: RunConfig, loaded: Loaded) -> tuple[list[Advice], list[str]]:
    """What would save memory, in order of gain, and the overrides that make a run fit.

    Args:
        plan: of the run as it is.
        run: the run.
        loaded: makes it with further overrides.

    Returns:
        Advice; and overrides that together make it fit, those first that cost least, or none where
        all of them do not.
    """
    found: list[Advice] = []
    chosen: list[str] = []
    current = plan
    for overrides, costs in candidates(run):
        try:
            alone = memory_plan(loaded(overrides), plan.target)
        except (ConfigError, ModelError):
            continue  # a package that it needs is not here
        if (saves := plan.total - alone.total) <= 0:
            continue
        found.append(Advice(overrides=overrides, saves=saves, costs=costs))
        if not current.fits:
            keys = {_key(override) for override in overrides}
            both = [*(other for other in chosen if _key(other) not in keys), *overrides]
            try:
                together = memory_plan(loaded(both), plan.target)
            except (ConfigError, ModelError):
                continue
            if together.total < current.total:
                chosen, current = both, together
    found.sort(key=lambda advice: -advice.saves)
    return found, chosen if current.fits else []


def _key(override: str) -> str:
    return override.partition("=")[0]
