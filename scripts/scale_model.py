"""The cost of Diffusion-DPO on Pick-a-Pic with SDXL on paper, on 1 to 1,024 GPUs.

    python scripts/scale_model.py
    python scripts/scale_model.py --mfu 0.45 --network-gb-s 25 --gpus 16 --gpus 256

Work and memory are the project's own count of a step at its true size (that of `diffalign plan`);
no weights are needed. Bandwidths and the share of the peak that a card attains are assumptions, an
option each. Prints Markdown tables for docs/scale.md, and last one line of JSON.

What is left out: stragglers and failures, the latency of kernels, the blocks that FSDP2 holds
gathered, and whatever grows with the number of processes in the host.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from measuring import machine, rounded
from plan_table import CONFIG, write_sdxl

from diffalign import config
from diffalign.console import silence_libraries
from diffalign.training import step_memory as steps
from diffalign.training.config import RunConfig
from diffalign.training.memory_plan import GIB, advance_plan, named_gpu

LANES = 32
"""Of a stream, at most: `diffalign/data/lanes.py`."""
BATCH, STEPS = 2048, 2000
"""Pairs of a step, and steps: launchers/sdxl.sh of DiffusionDPO."""
PAIRS, CAPTIONS = 851_293, 58_960
"""Pick-a-Pic v2 without ties (Wallace et al. 2023, arXiv:2311.12908)."""
CHECKPOINT_EVERY = 100
SHARDED = (steps.WEIGHTS, steps.TRAINED, steps.COPY, steps.GRADIENTS, steps.STATE)
"""Parts of the memory that FSDP2 shares out."""
CACHED = (
    *("model.encoders=cached", "reference=cached", "data.visits=5"),
    *("encodings_cache=encodings", "reference_cache=reference"),
)
WAYS: dict[str, tuple[str, ...]] = {
    "full": ("model.lora=null",),
    "full, streamed": ("model.lora=null", "data.streaming=true"),
    "full, cached": ("model.lora=null", *CACHED),
    "LoRA": ("model.lora={rank: 8}",),
    "LoRA, cached": ("model.lora={rank: 8}", *CACHED),
}
SHARDED_WAYS = ("full", "full, cached", "LoRA")
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Assumed: eight cards of the H100 class a node, one 400 Gbit/s adapter a card."""

    memory_gb: int = 80
    """Of a card."""
    peak_tflops: float = 989
    """Of a card in bf16, dense, by its data sheet."""
    mfu: float = 0.35
    """Share of it that a step attains, at any number of pairs a card."""
    gpus_per_node: int = 8
    nvlink_gb_s: float = 360
    """From a card to its node, one way: 80 % of 450."""
    network_gb_s: float = 40
    """From a card to other nodes, one way: 80 % of 400 Gbit/s."""
    hop_us: float = 10
    """Of one hop between nodes; a ring takes two for each node."""
    memory_gb_s: float = 2600
    """From a card's own memory: 78 % of 3,350."""
    node_store_gb_s: float = 5
    """From the store of the data to a node."""
    store_gb_s: float = 50
    """From the store to all nodes together."""
    write_gb_s: float = 2
    """Of one process that writes a checkpoint."""
    cores_per_gpu: int = 12
    decode_ms: float = 47
    """Of a core, for a pair of 1024 px JPEGs: scripts/bench_data.py."""
    jpeg_kb: float = 335
    """Of a pair: 335 GB by 1,001,352 rows."""

    def nodes(self, gpus: int) -> int:
        return math.ceil(gpus / self.gpus_per_node)

    def gather_s(self, size: float, gpus: int) -> float:
        """Until every card has all of what is shared out among them; so long takes the sum of
        gradients of which each keeps a part, and half as long as an all-reduce.

        Args:
            size: bytes of the whole.
            gpus: among which; those of a node exchange what the node received.
        """
        inside, nodes = min(gpus, self.gpus_per_node), self.nodes(gpus)
        within = size * (inside - 1) / inside / (self.nvlink_gb_s * GB)
        received = self.link_bytes(size, gpus) / (self.network_gb_s * GB)
        return within + received + (nodes - 1) * self.hop_us / 1e6

    def link_bytes(self, size: float, gpus: int) -> float:
        """What a gather brings through one card's adapter."""
        nodes = self.nodes(gpus)
        return size * (nodes - 1) / nodes / min(gpus, self.gpus_per_node)

    def from_store_s(self, size: float, gpus: int) -> float:
        """To read so many bytes, a part on each node."""
        return size / GB / min(self.store_gb_s, self.nodes(gpus) * self.node_store_gb_s)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train, by the project's own count."""

    name: str
    work: dict[str, float]
    """Floating-point operations of a pair by phase."""
    parts: dict[str, int]
    """Bytes by part with one pair at once, at the fullest moment."""
    further: int
    """Bytes that each further pair takes."""
    read: float
    """Bytes of a pair that a step reads."""
    decodes: bool
    """Whether these are JPEGs."""
    streams: bool
    """Whether pairs come in lanes, each of which several processes read where these are more."""

    @property
    def backward_share(self) -> float:
        return self.work[steps.BACKWARD] / sum(self.work.values())

    @property
    def gradients(self) -> int:
        """Bytes in float32."""
        return self.parts[steps.GRADIENTS]

    @property
    def checkpoint(self) -> int:
        """Bytes of trained weights and the optimiser's state."""
        return self.parts[steps.TRAINED] + self.parts[steps.STATE]

    @property
    def gathered(self) -> float:
        """Bytes in bf16 that FSDP2 gathers for a pass: weights for the forward and once more for
        the backward pass, and those of the reference."""
        base, copy = self.parts.get(steps.WEIGHTS, 0), self.parts.get(steps.COPY, 0)
        adapter_off = base if self.work[steps.REFERENCE] and not copy else 0
        return 2 * (self.parts[steps.TRAINED] / 2 + base) + copy + adapter_off

    @property
    def host(self) -> int:
        """Bytes of a process in the host's memory while it loads: all weights."""
        kept = (steps.WEIGHTS, steps.TRAINED, steps.COPY, steps.TEXT, steps.VAE)
        return sum(self.parts.get(part, 0) for part in kept)

    def memory(self, pairs: int, gpus: int) -> float:
        """Bytes of tensors on a card, weights shared out among so many."""
        shared = sum(self.parts.get(part, 0) for part in SHARDED)
        rest = sum(self.parts.values()) - shared + (pairs - 1) * self.further
        return rest + shared / gpus


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A run on so many cards; seconds are those of a step."""

    way: str
    layout: str
    gpus: int
    at_once: int
    """Pairs of a forward pass on a card."""
    accumulation: int
    memory_gib: float
    """Of a card, tensors and what plan adds for context and allocator."""
    compute_s: float
    sent_gb: float
    """Through each card's adapter, both ways of an all-reduce counted."""
    exchange_s: float
    exposed_s: float
    """Of the exchange, what the backward pass (DDP) or the whole step (FSDP2) does not cover."""
    update_s: float
    read_gb_s: float
    """By all cards together, at the rate of these steps."""
    read_s: float
    """That the store takes for the pairs of a step."""
    decode_s: float
    """That the cores take for them."""
    step_s: float
    checkpoint_s: float
    """Of one checkpoint, in which all wait."""
    load_s: float
    """To read the weights from the store, once."""
    hours: float
    """Of the whole run, checkpoints and loading included."""
    gpu_hours: float
    efficiency: float
    """Computation's share of the card hours."""
    bound_by: str
    """What takes longest, or else loses most."""


def count(name: str, model: Path, resolution: int, cluster: Cluster) -> Way:
    """Count a step of a way at its true size, on the meta device."""

    def planned(pairs: int) -> tuple[RunConfig, steps.StepMemory]:
        settings = [
            *(f"model.path={model}", "model.vae_dtype=fp16", "model.gradient_checkpointing=true"),
            *(f"data.resolution={resolution}", f"training.samples_per_device={pairs}"),
            *("model.images_per_encoding=1", "training.precision=bf16", "training.accumulation=2"),
            *WAYS[name],
        ]
        run = config.load(RunConfig, CONFIG, settings)
        return run, steps.step_memory(run, device="cuda")

    run, one = planned(1)
    _, two = planned(2)
    kept = advance_plan(run, None, named_gpu(f"{cluster.memory_gb}gb"))
    cached = bool(run.model.takes_encodings)
    return Way(
        name=name,
        work={phase: float(size) for phase, size in one.work.items()},
        parts=dict(one.parts),
        further=max(0, two.peak - one.peak),
        read=2 * kept.image + kept.caption if cached else 1000 * cluster.jpeg_kb,
        decodes=not cached,
        streams=run.data is not None and run.data.streaming,
    )


def cost(way: Way, layout: str, gpus: int, cluster: Cluster) -> Cost | None:
    """A run on so many cards; None where not even one pair fits them.

    Args:
        way: how it trains.
        layout: DDP or FSDP2.
        gpus: a divisor of the batch.
        cluster: what is assumed of them.
    """
    shards = gpus if layout == "FSDP2" else 1
    card = named_gpu(f"{cluster.memory_gb}gb")

    def taken(pairs: int) -> float:
        return card.overhead + (1 + card.fragmented) * way.memory(pairs, shards)

    fits = [n for n in (1, 2, 4, 8) if n * gpus <= BATCH and taken(n) <= card.capacity]
    if not fits:
        return None
    at_once = max(fits)
    accumulation = BATCH // (gpus * at_once)
    compute = BATCH / gpus * sum(way.work.values()) / (cluster.peak_tflops * 1e12 * cluster.mfu)
    of_pass = compute / accumulation

    gradient = cluster.gather_s(way.gradients, gpus)
    if layout == "DDP":
        exchange, sent = 2 * gradient, 2 * cluster.link_bytes(way.gradients, gpus)
        exposed = max(0.0, exchange - of_pass * way.backward_share)
    else:
        gathered = way.gathered
        once = cluster.gather_s(gathered, gpus) + gradient
        exchange = accumulation * once
        sent = accumulation * cluster.link_bytes(gathered + way.gradients, gpus)
        exposed = max(0.0, exchange - compute)
    moved = 2 * (way.gradients + way.checkpoint) / shards  # all of it is read, and written
    update = moved / (cluster.memory_gb_s * GB)

    pairs = BATCH * way.read * (max(1.0, gpus / LANES) if way.streams else 1)
    read = cluster.from_store_s(pairs, gpus)
    decode = BATCH * cluster.decode_ms / 1000 / (gpus * cluster.cores_per_gpu) * way.decodes
    busy = compute + exposed + update
    step = max(busy, read, decode)
    writers = 1 if layout == "DDP" else gpus
    store = min(cluster.store_gb_s, cluster.nodes(gpus) * cluster.node_store_gb_s)
    checkpoint = way.checkpoint / GB / min(store, writers * cluster.write_gb_s)
    load = cluster.from_store_s(cluster.nodes(gpus) * way.host, gpus)
    seconds = STEPS * step + STEPS / CHECKPOINT_EVERY * checkpoint + load
    losses = {
        "exchange": exposed,
        "update": update,
        "checkpoints": checkpoint / CHECKPOINT_EVERY,
        "loading": load / STEPS,
        "reading": max(0.0, read - busy),
        "decoding": max(0.0, decode - busy),
    }
    worst = max(losses, key=lambda name: losses[name])
    return Cost(
        way=way.name,
        layout=layout,
        gpus=gpus,
        at_once=at_once,
        accumulation=accumulation,
        memory_gib=taken(at_once) / GIB,
        compute_s=compute,
        sent_gb=sent / GB,
        exchange_s=exchange,
        exposed_s=exposed,
        update_s=update,
        read_gb_s=pairs / GB / step,
        read_s=read,
        decode_s=decode,
        step_s=step,
        checkpoint_s=checkpoint,
        load_s=load,
        hours=seconds / 3600,
        gpu_hours=gpus * seconds / 3600,
        efficiency=STEPS * compute / seconds,
        bound_by=worst if losses[worst] > 0.1 * compute else "compute",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def table_of_ways(ways: Sequence[Way], cluster: Cluster) -> str:
    """What is the same on any number of cards."""
    head = ("trains", "encode", "reference", "policy", "backward", "TFLOP a pair", "gradients, MB")
    head += ("checkpoint, GB", "read, kB a pair", "data set, GB", "host, GiB a node")
    rows = []
    for way in ways:
        tera = {phase: work / 1e12 for phase, work in way.work.items()}
        phases = (steps.ENCODE, steps.REFERENCE, steps.POLICY, steps.BACKWARD)
        rows.append(
            (
                way.name,
                *(f"{tera.get(phase, 0):.1f}" for phase in phases),
                f"{sum(tera.values()):.1f}",
                f"{way.gradients / 1e6:,.0f}",
                f"{way.checkpoint / GB:.2f}",
                f"{way.read / 1000:.0f}",
                f"{_data_set(way) / GB:,.0f}",
                f"{cluster.gpus_per_node * way.host / GIB:.0f}",
            )
        )
    return table(head, rows)


def _data_set(way: Way) -> float:
    """Bytes on the disk: captions are kept once, however many pairs have them."""
    if way.decodes:
        return PAIRS * way.read
    images = PAIRS * (way.read - _CAPTION)
    return images + CAPTIONS * _CAPTION


_CAPTION = 77 * 2048 * 2 + 1280 * 2
"""Bytes of SDXL's encoding of a caption in half precision, of the second encoder's pooled one
included."""


def table_of_costs(costs: Sequence[Cost | None], asked: Sequence[tuple[str, str, int]]) -> str:
    """One line for each run."""
    head = ("trains", "layout", "GPUs", "pairs x passes", "GiB", "compute, s", "sent, GB")
    head += ("exposed, s", "step, s", "read, GB/s", "cores a GPU", "checkpoint, s", "hours")
    head += ("GPU hours", "efficiency", "bound by")
    rows = []
    for (way, layout, gpus), found in zip(asked, costs, strict=True):
        if found is None:
            rows.append((way, layout, f"{gpus:,}", "does not fit", *[""] * (len(head) - 4)))
            continue
        cores = found.decode_s / found.step_s * Cluster.cores_per_gpu
        rows.append(
            (
                way,
                layout,
                f"{gpus:,}",
                f"{found.at_once} x {found.accumulation}",
                f"{found.memory_gib:.1f}",
                f"{rounded(found.compute_s):g}",
                f"{rounded(found.sent_gb):g}",
                f"{found.exposed_s:.2f}",
                f"{rounded(found.step_s):g}",
                f"{rounded(found.read_gb_s, 2):g}",
                f"{cores:.2f}",
                f"{rounded(found.checkpoint_s, 2):g}",
                f"{rounded(found.hours):g}",
                f"{found.gpu_hours:,.0f}",
                f"{found.efficiency:.0%}",
                found.bound_by,
            )
        )
    return table(head, rows)


def main(
    gpus: Annotated[list[int] | None, typer.Option(help="Numbers of GPUs.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Of a model; else SDXL is written.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 1024,
    mfu: Annotated[float, typer.Option(help="Share of the peak that is attained.")] = Cluster.mfu,
    peak_tflops: Annotated[float, typer.Option(help="Of a card.")] = Cluster.peak_tflops,
    network_gb_s: Annotated[
        float, typer.Option(help="Of a card to other nodes.")
    ] = Cluster.network_gb_s,
    store_gb_s: Annotated[float, typer.Option(help="Of the store in all.")] = Cluster.store_gb_s,
    write_gb_s: Annotated[float, typer.Option(help="Of one writer.")] = Cluster.write_gb_s,
    decode_ms: Annotated[float, typer.Option(help="Of a core for a pair.")] = Cluster.decode_ms,
) -> None:
    """Print the tables and the JSON."""
    numbers = gpus or [1, 8, 64, 1024]
    for number in numbers:
        if number < 1 or BATCH % number:
            raise SystemExit(f"--gpus {number}: a batch of {BATCH:,} pairs needs a divisor of it")
    silence_libraries()
    cluster = replace(
        Cluster(),
        mfu=mfu,
        peak_tflops=peak_tflops,
        network_gb_s=network_gb_s,
        store_gb_s=store_gb_s,
        write_gb_s=write_gb_s,
        decode_ms=decode_ms,
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = folder or write_sdxl(Path(scratch))
        ways = {name: count(name, model, resolution, cluster) for name in WAYS}
    asked = [
        (name, layout, number)
        for name in WAYS
        for layout in ("DDP", "FSDP2")
        for number in numbers
        if layout == "DDP" or (number > 1 and name in SHARDED_WAYS)
    ]
    costs = [cost(ways[name], layout, number, cluster) for name, layout, number in asked]
    print(table_of_ways(list(ways.values()), cluster))
    print()
    print(table_of_costs(costs, asked))
    print()
    print(
        json.dumps(
            {
                "recipe": {"batch": BATCH, "steps": STEPS, "pairs": PAIRS, "captions": CAPTIONS},
                "cluster": asdict(cluster),
                "ways": [asdict(way) for way in ways.values()],
                "costs": [asdict(found) for found in costs if found is not None],
                "counted_on": machine(),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
