"""Ours next to the peers' way: DPO of images and of responses, generation, and POPE.

    OMP_NUM_THREADS=1 python scripts/bench_peers.py                    # some three minutes on a CPU
    OMP_NUM_THREADS=1 python scripts/bench_peers.py --only sdxl --only llava --rounds 9
    python scripts/bench_peers.py --true-size                          # on a GPU, in bf16
    OMP_NUM_THREADS=1 python scripts/bench_peers.py --tiny             # one step of each

The peers' way is written here as a plain loop: for images what diffusers' scripts
train_diffusion_dpo.py and train_diffusion_dpo_sdxl.py compute in a step (for SD3, which they do not
train, the same with its flow), for responses what TRL's DPO computes in one, its figures included.
Generation is a loop over diffusers' pipeline, and POPE one over transformers' `generate`, a
question at a time. Same models (random weights, scripts/peer_models.py), data, batch, adapter,
precision; both in turn in one process, in reversed order every other round. Seconds are of the CPU,
on a GPU of the clock. The ratio is the peers' time by ours, so that above 1 ours is faster: its
median, and the smallest and largest of the rounds. Prints a Markdown table, then a line of JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_cache import WARM_UP
from bench_cache import ours as steps_of_ours
from measuring import machine, now, on_this_machine, spread
from plain_loops import (
    BETA_IMAGES,
    BETA_RESPONSES,
    ENCODED_AT_ONCE,
    FULL,
    GENERATION_STEPS,
    GUIDANCE,
    LR,
    NEW_TOKENS,
    PROMPTS,
    RANK,
    TINY,
    Bench,
    Sizes,
    plain_images,
    plain_responses,
    questions,
    their_images,
    their_pope,
)

from diffalign import config
from diffalign.benchmarks.pope.config import Pope
from diffalign.console import silence_libraries
from diffalign.jobs import evaluate, generate
from diffalign.training.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES, RESPONSES = (
    CONFIGS / "smoke/diffusion_dpo_sdxl.yaml",
    CONFIGS / "playground/responses/dpo.yaml",
)
CLOSE = 0.02
"""By how much first losses may differ from ln 2: adapters start at zero."""


def our_steps(bench: Bench, kind: str) -> float:
    """Seconds of steps of ours, by its own loop."""
    steps = [f"training.optimizer_steps={WARM_UP + bench.sizes.steps}", f"optimizer.lr={LR}"]
    steps += ["training.log_every=1", f"training.precision={bench.precision}"]
    steps += [f"output={bench.output()}", f"model.path={bench.model(kind)}"]
    if kind in ("llava", "qwen"):
        settings = [
            *(f"responses.path={bench.response_pairs}", f"model.lora={{rank: {RANK}}}"),
            *(f"training.samples_per_device={bench.sizes.response_pairs}", *steps),
            *(f"objective.beta={BETA_RESPONSES}", "optimizer.warmup_steps=0"),
        ]
        run = config.load(RunConfig, RESPONSES, settings)
    else:
        settings = [
            *(f"model.kind={kind}", f"model.lora={{rank: {RANK}}}"),
            *(f"data.path={bench.image_pairs(kind)}", "data.caption_dropout=0", "data.flip=false"),
            *(f"data.resolution={bench.resolution(kind)}", f"objective.beta={BETA_IMAGES}"),
            *(
                f"training.samples_per_device={bench.sizes.pairs}",
                f"model.images_per_encoding={ENCODED_AT_ONCE}",
            ),
            *steps,
        ]
        run = config.load(RunConfig, IMAGES, settings)
    found = steps_of_ours(run, bench.sizes.steps)
    refuse_other_start(kind, "ours", found.losses[0])
    refuse_another_adapter(bench, kind, found.trained)
    return found.seconds


def their_steps(bench: Bench, kind: str) -> float:
    """Seconds of as many steps of a plain loop."""
    loop = plain_responses if kind in ("llava", "qwen") else plain_images
    steps = loop(bench, kind)
    first, trained = next(steps)
    refuse_other_start(kind, "the plain loop", first)
    refuse_another_adapter(bench, kind, trained)
    for _ in islice(steps, WARM_UP - 1):
        pass
    started = now()
    for _ in islice(steps, bench.sizes.steps):
        pass
    return now() - started


def refuse_another_adapter(bench: Bench, kind: str, trained: int) -> None:
    """Raise SystemExit unless both ways train as many numbers."""
    known = bench.trained.setdefault(kind, trained)
    if trained != known:
        raise SystemExit(f"{kind}: one way trains {known:,} numbers, and the other {trained:,}")


def refuse_other_start(kind: str, whose: str, loss: float) -> None:
    """Raise SystemExit unless policy and reference agree before the first update."""
    if not abs(loss - math.log(2)) < CLOSE:
        raise SystemExit(f"{kind}: the first loss of {whose} is {loss:.4f}, and ln 2 is 0.6931")


def our_images(bench: Bench, kind: str) -> float:
    """Seconds of `diffalign generate`, loading included."""
    side, seeds = bench.resolution(kind), -(-bench.sizes.images // len(PROMPTS))
    settings = [
        *(f"models.base={bench.model(kind)}", f"prompts.texts={json.dumps(PROMPTS)}"),
        *(f"seeds={seeds}", f"sampler.steps={GENERATION_STEPS}", f"sampler.guidance={GUIDANCE}"),
        *(f"sampler.height={side}", f"sampler.width={side}", f"dtype={bench.precision}"),
        *("batch_size=4", f"output={bench.output()}"),
    ]
    started = now()
    generate.run(config.load(generate.GenerateConfig, overrides=settings))
    return now() - started


def our_pope(bench: Bench, kind: str) -> float:
    """Seconds of `diffalign evaluate pope`, loading and figures included."""
    asked = questions(bench)
    settings = [
        *(f"questions={asked.file}", "model.kind=vlm", f"model.path={bench.model(kind)}"),
        *(f"asking.images={asked.images}", f"asking.saves={bench.output()}.jsonl"),
        *(f"asking.max_new_tokens={NEW_TOKENS}", f"asking.dtype={bench.precision}"),
    ]
    started = now()
    evaluate.run(config.load(Pope, overrides=settings), json_only=True)
    return now() - started


Way = Callable[[Bench, str], float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two ways to the same end."""

    title: str
    kind: str
    ours: Way
    theirs: Way
    unit: str
    amount: Callable[[Sizes], int]


def _dpo(kind: str, shape: str, peer: str, pairs: Callable[[Sizes], int]) -> Comparison:
    return Comparison(
        title=f"DPO, LoRA, {shape}; {peer}",
        kind=kind,
        ours=our_steps,
        theirs=their_steps,
        unit="pairs/s",
        amount=lambda sizes: sizes.steps * pairs(sizes),
    )


COMPARISONS = {
    "sd15": _dpo("sd15", "SD 1.5", "diffusers' step", lambda sizes: sizes.pairs),
    "sdxl": _dpo("sdxl", "SDXL", "diffusers' step", lambda sizes: sizes.pairs),
    "sd3": _dpo("sd3", "SD3", "diffusers' step", lambda sizes: sizes.pairs),
    "llava": _dpo("llava", "LLaVA-1.5", "TRL's step", lambda sizes: sizes.response_pairs),
    "qwen": _dpo("qwen", "Qwen2.5-VL", "TRL's step", lambda sizes: sizes.response_pairs),
    "generate": Comparison(
        title="`generate`, SDXL; pipeline in a loop",
        kind="sdxl",
        ours=our_images,
        theirs=their_images,
        unit="images/s",
        amount=lambda sizes: -(-sizes.images // len(PROMPTS)) * len(PROMPTS),
    ),
    "pope": Comparison(
        title="`evaluate pope`, LLaVA-1.5; `generate` in a loop",
        kind="llava",
        ours=our_pope,
        theirs=their_pope,
        unit="questions/s",
        amount=lambda sizes: -(-sizes.questions // 3) * 3,
    ),
}


def in_turn(bench: Bench, comparison: Comparison, number: int) -> tuple[float, float]:
    """Seconds of ours and of theirs, the order reversed every other time; nothing is printed."""
    ways = {"ours": comparison.ours, "theirs": comparison.theirs}
    seconds = {}
    for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            seconds[name] = ways[name](bench, comparison.kind)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return seconds["ours"], seconds["theirs"]


def main(
    only: Annotated[list[str] | None, typer.Option(help=", ".join(COMPARISONS))] = None,
    rounds: Annotated[int, typer.Option(help="Of each way, in turn.", min=1)] = 5,
    true_size: Annotated[bool, typer.Option(help="Published sizes, bf16; on a GPU.")] = False,
    tiny: Annotated[bool, typer.Option(help="One step of each, one round.")] = False,
) -> None:
    """Print the table and the JSON."""
    for name in only or ():
        if name not in COMPARISONS:
            raise SystemExit(f"--only {name}: there is {', '.join(COMPARISONS)}")
    if true_size and not torch.cuda.is_available():
        raise SystemExit("--true-size needs a GPU: on a CPU a step of these sizes takes hours")
    silence_libraries()
    here, sizes = machine(), TINY if tiny else FULL
    print(on_this_machine(here))
    print("\n| what; next to | ours | peers | peers' time by ours |\n|---|---|---|---|")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench_peers-") as scratch:
        bench = Bench(folder=Path(scratch), sizes=sizes, true_size=true_size)
        for name in only or COMPARISONS:
            comparison = COMPARISONS[name]
            turns = [in_turn(bench, comparison, number) for number in range(1 if tiny else rounds)]
            ours, theirs = zip(*turns, strict=True)
            ratios = [other / own for own, other in turns]
            amount = comparison.amount(sizes)
            rates = [
                f"{amount / statistics.median(s):.3g} {comparison.unit}" for s in (ours, theirs)
            ]
            print(f"| {comparison.title} | {' | '.join(rates)} | {spread(ratios)} |", flush=True)
            found[name] = {"ours_s": ours, "peers_s": theirs, "ratios": ratios, "amount": amount}
    print("\n" + json.dumps({"machine": here, "true_size": true_size, "seconds": found}))


if __name__ == "__main__":
    typer.run(main)
