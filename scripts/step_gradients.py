"""Which steps of a sampler D3PO's gradient comes from.

    python scripts/step_gradients.py configs/playground/d3po.yaml

Collects the first round of a config, with the policy that it starts from, and takes the gradient of
the mean margin, the log-density of the chosen side minus that of the rejected one, for each step by
itself. `share` is that of its squared norm in the sum over all steps. What has a large share moves
the weights; whether it says anything about the preference is another matter.
`rollouts.trained_steps` leaves the last steps out.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="of a run whose rollouts are of kind d3po")
    parser.add_argument("overrides", nargs="*", help="as for diffalign train")
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
        norms = [
            gradient(model, likelihood, folder, [pair.step(i, at) for pair in pairs]).norm().item()
            for i, at in enumerate(times)
        ]
    whole = sum(norm**2 for norm in norms)
    print(f"{len(pairs)} pairs\n\n| step | from, to | norm | share |\n|---|---|---|---|")
    for i, ((t, t_next), norm) in enumerate(zip(times, norms, strict=True), start=1):
        print(f"| {i} | {t}, {t_next} | {norm:.2g} | {norm**2 / whole:.1%} |")


if __name__ == "__main__":
    main()
