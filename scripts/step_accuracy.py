"""Measure how well scorers see through noise: half-denoised pairs, by timestep.

    python scripts/make_playground_preferences.py --held-out --images 80 --out runs/held_out
    python scripts/step_accuracy.py runs/playground_spm/final --pairs runs/held_out

Prints a table: the plain scorer that the preference model started from, which is not told the
timestep, the preference model, and their difference with its 95 % interval, resampled by prompt.
The pairs should be of prompts that neither was trained on. Without further options all of it is the
playground's; a real preference model is measured with

    python scripts/step_accuracy.py runs/spm_sd15/final --pairs PAIRS --base sd15 PATH \
        --plain yuvalkirstain/PickScore_v1 --resolution 512 --guidance 5
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffalign import components
from diffalign.comparison.compare import compare_scores
from diffalign.comparison.step_accuracy import (
    AUTHORS_TIMESTEPS,
    Agreement,
    accuracy_by_timestep,
    decided_pairs,
)
from diffalign.data.pairs.config import PairConfig
from diffalign.models.devices import choose_device
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.playground.models import playground_clip_path, playground_model_path
from diffalign.playground.scenes import IMAGE_SIZE
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.pickscore import PickScore
from diffalign.scorers.step_aware import StepAware


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preference_model", type=Path, help="folder that its training exported")
    parser.add_argument("--pairs", required=True, help="unseen pairs: as data.path of a config")
    parser.add_argument(
        "--plain",
        nargs="+",
        default=[str(playground_clip_path())],
        help="PickScore-like scorers without a sense of time; the first is compared with",
    )
    parser.add_argument(
        "--base",
        nargs=2,
        metavar=("KIND", "PATH"),
        default=("sdxl", str(playground_model_path())),
        help="diffusion model whose predictions are scored",
    )
    parser.add_argument("--resolution", type=int, default=IMAGE_SIZE)
    parser.add_argument("--guidance", type=float, default=2.0, help="of the one-step predictions")
    parser.add_argument("--batch-size", type=int, default=54, help="pairs at a time")
    parser.add_argument("--limit", type=int, help="only the first so many pairs, for a trial")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    kind, path = args.base
    device = choose_device("auto")
    base = components.find(AbstractDiffusion, kind)(path=path)  # type: ignore[call-arg]
    scorers: dict[str, AbstractScorer] = {
        **{f"plain: {plain}": PickScore(path=plain) for plain in args.plain},
        "step-aware": StepAware(path=str(args.preference_model)),
    }
    found = accuracy_by_timestep(
        {name: scorer.to(device) for name, scorer in scorers.items()},
        base.load(device=device, compute_dtype=torch.float32, reference="none"),
        decided_pairs(
            PairConfig(path=args.pairs, resolution=args.resolution, flip=False, limit=args.limit),
            batch_size=args.batch_size,
        ),
        guidance=args.guidance,
    )
    print(table(found, AUTHORS_TIMESTEPS))


def table(found: Mapping[str, Mapping[int, Agreement]], timesteps: Sequence[int]) -> str:
    """Accuracy of every scorer, and of the last against the others, as Markdown."""
    columns = {f"t = {t}": (t,) for t in timesteps}
    columns |= {"noisy, all": tuple(t for t in timesteps if t > 0)}
    over = {
        name: {column: _mean(by_time, ts) for column, ts in columns.items()}
        for name, by_time in found.items()
    }
    *plain, scored = over
    lines = [f"| scorer | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, agreements in over.items():
        shares = (sum(a.values()) / len(a) for a in agreements.values())
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    for name in plain:
        cells = [_difference(over[name][column], over[scored][column]) for column in columns]
        lines.append(f"| {scored} minus {name} | {' | '.join(cells)} |")
    pairs = found[scored][timesteps[0]]
    prompts = len({prompt for prompt, _ in pairs})
    return "\n".join([*lines, "", f"{len(pairs):,} decided pairs of {prompts} prompts."])


def _mean(by_time: Mapping[int, Agreement], timesteps: Sequence[int]) -> Agreement:
    """The agreement with each pair, averaged over timesteps."""
    return {
        place: sum(by_time[t][place] for t in timesteps) / len(timesteps)
        for place in by_time[timesteps[0]]
    }


def _difference(plain: Agreement, scored: Agreement) -> str:
    found = compare_scores(plain, scored)
    if found.mean_difference_interval is None:  # all prompts differ alike
        return f"{100 * found.mean_difference:+.1f} (no interval)"
    low, high = found.mean_difference_interval
    return f"{100 * found.mean_difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()
