"""`diffalign plan CONFIG.yaml [--gpu 24gb]`: the memory of a run by part, before it is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign.console import in_bytes, in_time, silence_libraries
from diffalign.data.pairs.encoded import PairsToEncode
from diffalign.data.pairs.source import PairSource
from diffalign.training import build
from diffalign.training.config import RunConfig
from diffalign.training.memory_plan import (
    ASSUMED_RATE,
    ATTAINED,
    GIB,
    AdvancePlan,
    Advice,
    MemoryPlan,
    advance_plan,
    advise,
    memory_plan,
    named_gpu,
    this_machine,
)
from diffalign.training.response_memory import blank_image_of, longest_row

_WHEN = {
    "encode": "while the autoencoder or a text encoder runs",
    "reference": "in the reference's forward",
    "policy": "in the policy's forward",
    "backward": "in the backward pass",
    "update": "while the optimiser updates the weights",
}


def run(
    loaded: Callable[[Sequence[str]], RunConfig], *, gpu: str | None = None, as_json: bool = False
) -> MemoryPlan:
    """Count, and print.

    Args:
        loaded: gives the run with further overrides.
        gpu: memory of a card, such as `24gb`; None is this machine's device.
        as_json: print one JSON object, and no table.

    Raises:
        ConfigError: no such card, or a run of a kind that is not planned yet.
    """
    silence_libraries()
    target = this_machine() if gpu is None else named_gpu(gpu)
    run_config = loaded(())
    plan = memory_plan(run_config, target)
    found, chosen = ([], []) if plan.fits else advise(plan, run_config, loaded)
    console = Console(highlight=False)
    advance = None
    if run_config.responses is None:
        advance = advance_plan(run_config, _pairs(run_config), target)
    if as_json:
        print(json.dumps(_plain(plan, advance, found, chosen)))
    else:
        _print(console, plan, found, chosen)
        said = _of_responses(run_config) if advance is None else _of_precompute(advance)
        console.print(said, soft_wrap=True)
    return plan


def _pairs(run_config: RunConfig) -> PairsToEncode | None:
    """Those of data that is on this disk; nothing is downloaded for a count."""
    data = run_config.data
    if data is None or data.streaming or not Path(data.path).exists():
        return None
    if data.crop == "random" and data.crops is None:
        return None
    request = build.source_request(run_config, Console(quiet=True))
    source = run_config.section.open(dataclasses.replace(request, encodings=None))  # none are there
    return source.pairs_to_encode() if isinstance(source, PairSource) else None


def _of_responses(run: RunConfig) -> str:
    return (
        f"Planned for rows of {longest_row(run)} tokens, an image of {blank_image_of(run).tokens} "
        f"among them: the longest that responses.max_length lets through."
    )


def _of_precompute(advance: AdvancePlan) -> str:
    rate = f"at {advance.rate / 1e12:.3g} TFLOP/s, which is "
    rate += "assumed" if advance.rate == ASSUMED_RATE else f"{ATTAINED:.0%} of a matrix product's"
    if advance.encodings is None or advance.seconds is None:
        each = advance.work.image / advance.rate
        return (
            f"On the disk diffalign precompute would take {in_bytes(advance.image)} an image and "
            f"way to see it (mirrored or not), and {in_bytes(advance.caption)} a caption; about "
            f"{in_time(1000 * each)} for a thousand images ({rate}). How many there are is counted "
            f"where data.path is on this disk."
        )
    of_reference = (
        "" if advance.reference is None else f" and {in_bytes(advance.reference)} for the reference"
    )
    return (
        f"On the disk diffalign precompute would take {in_bytes(advance.encodings)} for encodings"
        f"{of_reference}; about {in_time(advance.seconds)} ({rate})."
    )


def _plain(
    plan: MemoryPlan, advance: AdvancePlan | None, found: Sequence[Advice], chosen: Sequence[str]
) -> dict[str, Any]:
    return {
        "precompute": advance and {**dataclasses.asdict(advance), "seconds": advance.seconds},
        "device": plan.target.name,
        "capacity_bytes": plan.target.capacity,
        "parts_bytes": dict(plan.parts()),
        "phases_bytes": {phase: dict(parts) for phase, parts in plan.step.phases.items()},
        "peak_phase": plan.step.fullest,
        "tensors_bytes": plan.step.peak,
        "total_bytes": plan.total,
        "fits": plan.fits,
        "advice": [
            {"overrides": list(a.overrides), "saves_bytes": a.saves, "costs": a.costs}
            for a in found
        ],
        "overrides_that_fit": list(chosen),
    }


def _print(
    console: Console, plan: MemoryPlan, found: Sequence[Advice], chosen: Sequence[str]
) -> None:
    table = Table("part", "GiB", box=None)
    table.columns[1].justify = "right"
    for part, size in plan.parts().items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("[bold]peak", f"[bold]{plan.total / GIB:.2f}")
    console.print(table)
    console.print(f"The peak is {_WHEN[plan.step.fullest]}.")
    verdict = (
        f"[green]It fits {escape(plan.target.name)}: {plan.free / GIB:.1f} GiB stay free."
        if plan.fits
        else f"[red]It does not fit {escape(plan.target.name)}: {-plan.free / GIB:.1f} GiB are "
        f"missing."
    )
    console.print(verdict, soft_wrap=True)
    for advice in found:
        said = " ".join(advice.overrides)
        console.print(
            f"  {said} saves {advice.saves / GIB:.2f} GiB (costs {advice.costs})",
            markup=False,
            soft_wrap=True,
        )
    if chosen:
        console.print("These make it fit; give them after the config:")
        console.print("  " + " ".join(map(_quoted, chosen)), markup=False, soft_wrap=True)
    elif not plan.fits:
        console.print("None of these, nor all together, make it fit: take a larger card.")


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override
