"""Whether the checkpoint that `diffalign best-checkpoint` names is as good on other prompts.

    python scripts/check_best_checkpoint.py            # some 12 minutes on two cores
    python scripts/check_best_checkpoint.py --steps 4 --checkpoints 2 --prompts 2 --seeds 1 \\
      --out /tmp/best

Trains configs/playground/diffusion_dpo.yaml at a constant learning rate past its best, with ten
checkpoints. They are chosen from by prompts that `data.holdout` kept back, and then all are
measured on the combinations that no preference mentions: the named one's win rate there should lie
in the interval of the best of ten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign import config
from diffalign.comparison.checkpoints import Measured, best_of
from diffalign.data.held_out import is_held_out
from diffalign.generation.prompts import PromptsConfig
from diffalign.generation.text_to_image import SamplerConfig
from diffalign.jobs import best_checkpoint, train
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.playground.scenes import held_out_prompts, preference_prompts
from diffalign.training.checkpoint import checkpoints_in
from diffalign.training.config import RunConfig

CONFIG = Path("configs/playground/diffusion_dpo.yaml")
HOLDOUT = 0.1


def main() -> None:
    """Train, choose, measure on other prompts, print both and the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=36, help="at most, of either kind")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/best_checkpoint"))
    given = parser.parse_args()
    run = _trained(given)
    kept_back = [prompt for prompt in preference_prompts() if is_held_out(prompt, HOLDOUT)]
    chosen, _ = _measured(run, "chosen_by", kept_back[: given.prompts], given)
    _, others = _measured(run, "held_out", list(held_out_prompts())[: given.prompts], given)
    named = next(each for each in others if each.step == chosen.step)
    best = best_of(others)
    low, high = best.bounds
    print(
        f"named: step {named.step}, {named.win_rate:.1%} on the other prompts; best of "
        f"{len(others)} there: step {best.step}, {best.win_rate:.1%} ({low:.1%} to {high:.1%})"
    )
    if not low <= named.win_rate <= high:
        raise SystemExit("the named checkpoint is not as good as the best one")
    print("the named checkpoint lies in the interval of the best")


def _trained(given: argparse.Namespace) -> Path:
    output: Path = given.out / "run"
    settings = {
        "output": output,
        "optimizer.lr": given.lr,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": min(20, given.steps // 4),
        "training.optimizer_steps": given.steps,
        "training.checkpoint_every": given.steps // given.checkpoints,
        "training.keep_checkpoints": given.checkpoints,
        "data.holdout": HOLDOUT,
        "evaluation.every": max(1, given.steps // given.checkpoints),
    }
    if not checkpoints_in(output):
        overrides = [f"{key}={value}" for key, value in settings.items()]
        train.run(config.load(RunConfig, CONFIG, overrides))
    return output


def _measured(
    run: Path, name: str, prompts: list[str], given: argparse.Namespace
) -> tuple[Measured, list[Measured]]:
    """The checkpoint that these prompts name, and all of them."""
    return best_checkpoint.run(
        best_checkpoint.BestCheckpointConfig(
            run=run,
            prompts=PromptsConfig(texts=tuple(prompts)),
            scorer=PlaygroundOracle(),
            seeds=given.seeds,
            sampler=SamplerConfig(steps=12, guidance=2.0),
            batch_size=36,
            output=given.out / name,
        )
    )


if __name__ == "__main__":
    main()
