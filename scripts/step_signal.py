"""Which steps of a sampler D3PO's gradient comes from, and on which of them prompts agree.

    python scripts/step_signal.py configs/playground/d3po.yaml
    python scripts/step_signal.py configs/playground/d3po.yaml rollouts.prompts_per_round=324

Collects the first round of a config, with the policy that it starts from, and deals its pairs to
--parts. The gradient of the mean margin, the log-density of the chosen side minus that of the
rejected one, is taken for each step and part. `norm` is that of a part; `cosine` is between two of
them, on average: what is near 0 is noise. `first n` is the sum over the first n steps, which is
what `rollouts.trained_steps: n` trains on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from diffalign import config
from diffalign.files import read_rows
from diffalign.likelihoods.transition import Transition
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.rollouts.store import StepPair, step_batch
from diffalign.rollouts.trajectory_pairs import TrajectoryPair
from diffalign.training.build import build_source
from diffalign.training.config import RunConfig

ROWS = 64
"""Pairs of a forward pass."""


def gradient(
    model: DiffusionModel, likelihood: Transition, folder: Path, steps: Sequence[StepPair]
) -> Tensor:
    """Of the mean margin of some steps, as one vector [parameters]."""
    parameters = [parameter for _, parameter in model.trained_parameters()]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for start in range(0, len(steps), ROWS):
        batch = step_batch(folder, steps[start : start + ROWS])
        found = likelihood.evaluate(model, likelihood.prepare(model, batch))
        margin = (found["chosen"] - found["rejected"]).sum() / len(steps)
        values = torch.autograd.grad(margin, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([value.flatten().cpu() for value in values])
    return total


def agreement(gradients: Tensor) -> tuple[float, float]:
    """Mean norm and mean cosine of the parts' gradients, [parts, parameters]."""
    norms = gradients.norm(dim=1)
    unit = gradients / norms[:, None]
    cosines = unit @ unit.T
    parts = len(gradients)
    return norms.mean().item(), ((cosines.sum() - parts) / (parts * (parts - 1))).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="of a run whose rollouts are of kind d3po")
    parser.add_argument("overrides", nargs="*", help="as for diffalign train")
    parser.add_argument("--parts", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        run = config.load(
            RunConfig, arguments.config, [*arguments.overrides, f"output={output}/run"]
        )
        likelihood = run.likelihood
        assert isinstance(likelihood, Transition), "the config's likelihood must be transition"
        model = run.model.load(
            device=torch.device("cpu"), compute_dtype=torch.float32, reference="past_policy"
        )
        assert isinstance(model, DiffusionModel)
        source = build_source(run, Console(quiet=True), skipped=None)
        source.bind(model)
        next(iter(source))  # the round is collected before its first batch
        folder = run.output / "rounds" / "round-0000"
        pairs = read_rows(TrajectoryPair, folder / "pairs.jsonl")
        times = model.noising.variance_preserving().reverse_times(likelihood.process.steps)
        found = torch.stack(
            [
                torch.stack(
                    [
                        gradient(
                            model,
                            likelihood,
                            folder,
                            [pair.step(i, time) for pair in pairs[part :: arguments.parts]],
                        )
                        for part in range(arguments.parts)
                    ]
                )
                for i, time in enumerate(times)
            ]
        )
    print(f"{len(pairs)} pairs in {arguments.parts} parts\n")
    print("| step | from, to | norm | cosine | cosine of the first n |\n|---|---|---|---|---|")
    for i, (t, t_next) in enumerate(times):
        norm, cosine = agreement(found[i])
        _, cumulative = agreement(found[: i + 1].sum(dim=0))
        print(f"| {i + 1} | {t}, {t_next} | {norm:.3g} | {cosine:.3f} | {cumulative:.3f} |")


if __name__ == "__main__":
    main()
