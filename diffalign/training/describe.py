"""What a run is about to do, in the words of the start of its log and of its model card."""

from __future__ import annotations

from diffalign import components
from diffalign.training.config import RunConfig
from diffalign.training.reference import resolve_reference


def plan(
    run: RunConfig, processes: int, *, accumulation: int | None = None
) -> list[tuple[str, str]]:
    """What the run is about to do, as pairs of heading and sentence.

    Args:
        run: the config.
        processes: on how many.
        accumulation: forward passes of a step on each; None is what the config says.
    """
    training, optimizer = run.training, run.optimizer
    accumulation = accumulation or training.accumulation
    batch = training.samples_per_device * accumulation * processes
    parts = f"{training.samples_per_device} per device x {accumulation} accumulated"
    if training.tokens_per_device is not None:
        samples = training.samples_per_device * accumulation
        parts = f"{samples} per device, cut by length,"
    lines = [
        ("model", run.model.describe()),
        ("reference", resolve_reference(run)),
        ("rollouts", run.section.describe()),
        ("likelihood", run.likelihood.describe()),
        ("prefix", run.likelihood.note(run.model)),
        ("objective", f"{components.kind_of(run.objective)}{_scale(run)}"),
        ("loss", run.objective.note()),
        (
            "batch",
            f"{batch} samples per step = {parts} x {processes} processes",
        ),
        (
            "optimiser",
            f"{components.kind_of(optimizer)}, lr {optimizer.lr:g} as written, "
            f"{optimizer.schedule} after {optimizer.warmup_steps} warm-up steps, "
            f"clipped at {optimizer.max_grad_norm}",
        ),
        ("length", f"{training.optimizer_steps} steps, {training.precision}"),
    ]
    return [(heading, text) for heading, text in lines if text]


def _scale(run: RunConfig) -> str:
    beta = getattr(run.objective, "beta", None)
    if beta is None:
        return ""
    # Published units are those of a beta that multiplies log-ratios; MaPO's weighs a term.
    published = run.likelihood.published_scale(beta) if run.objective.needs_reference else ""
    return f", beta {beta:g}{published}"
