"""`diffalign demo`: the main job on the embedded playground, through the same doors as real data.

Train on the shipped Pick-a-Pic file, generate held-out prompts with base and aligned model from the
same noise, let the oracle read the images, and compare. Every part is a command of its own;
stopped anywhere, the same command goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from diffalign import config as configs
from diffalign.comparison.report import percent, percent_interval
from diffalign.generation.prompts import PromptsConfig
from diffalign.generation.text_to_image import SamplerConfig
from diffalign.jobs import compare, generate, score, train
from diffalign.playground.models import playground_model_path
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.playground.scenes import held_out_prompts
from diffalign.training.checkpoint import checkpoints_in
from diffalign.training.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Config, model and folder of the demo."""

    config: Path = Path("configs/playground/diffusion_dpo.yaml")
    """The training run."""
    output: Path = Path("runs/demo")
    """The run folder; images and report go to `evaluation/` below it."""
    overrides: tuple[str, ...] = ()
    """For the training run, as `key.path=value`."""
    seeds: int = 9
    """Images of every held-out prompt, for each model."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=12, guidance=2.0))
    """How they are generated."""
    batch_size: int = 36
    """Images generated at once."""


def run(demo: DemoConfig) -> None:
    """Align, generate, score, compare; ends by naming the grid, the report and the next command."""
    started = time.monotonic()
    console = Console(highlight=False)
    model = playground_model_path()
    run_config = configs.load(RunConfig, demo.config, [*demo.overrides, f"output={demo.output}"])

    console.rule("1 of 4  Align the tiny SDXL with preferences")
    if not train_or_go_on(run_config, console):
        console.print("The same command goes on from here")
        return

    images = demo.output / "evaluation"
    console.rule("2 of 4  Generate prompts that the preferences never mentioned")
    generate.run(
        generate.GenerateConfig(
            models={"base": str(model), "aligned": str(demo.output)},
            prompts=PromptsConfig(texts=tuple(held_out_prompts())),
            seeds=demo.seeds,
            sampler=demo.sampler,
            batch_size=demo.batch_size,
            output=images,
        )
    )
    console.rule("3 of 4  Ask the oracle what each image shows")
    score.run(score.ScoreConfig(images=images, scorer=PlaygroundOracle(), batch_size=256))
    console.rule("4 of 4  Compare, paired by prompt and seed")
    (result,) = compare.run(compare.CompareConfig(images=images, baseline="base"))

    c = result.comparison
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.rule(f"Done in {minutes}:{seconds:02} min")
    console.print(
        f"Prompt fidelity {c.baseline_mean:.0%} -> {c.model_mean:.0%} on {c.items} images of "
        f"held-out prompts; the aligned model wins {percent(c.win_rate)} of the decided "
        f"pairs (95% interval {percent_interval(c.win_rate_interval)}).\n\n"
        f"  grid    {images / 'comparison.png'}\n"
        f"  report  {images / 'report.html'}\n"
        f"  model   {demo.output / 'final'}\n\n"
        f"Next, the same on your own pairs (checks everything, trains nothing):\n"
        f"  diffalign train configs/diffusion_dpo/sdxl_lora_24gb.yaml data.path=YOUR_PAIRS "
        f"--dry-run",
        markup=False,
        soft_wrap=True,
    )


def train_or_go_on(run_config: RunConfig, console: Console) -> bool:
    """Train, or go on with it, unless it is done.

    Returns:
        Whether there is an aligned model; False if training was asked to stop.
    """
    final = run_config.output / "final"
    if final.is_dir():
        console.print(
            f"{final} is there already; delete {run_config.output} to start afresh",
            markup=False,
            soft_wrap=True,
        )
        return True
    started = bool(checkpoints_in(run_config.output))
    return train.run(run_config, resume=run_config.output if started else None) is not None
