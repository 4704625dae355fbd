"""The hooks that a config asks for: what may be refused of them, and those of one run."""

from __future__ import annotations

from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.training.config import RunConfig
from diffalign.training.hooks.base import AbstractHook
from diffalign.training.hooks.held_out import HeldOutEvaluation


def check_hooks(run: RunConfig) -> None:
    """Raise ConfigError for a hook that this run cannot have, before data or weights are opened."""
    _check_held_out(run)


def open_hooks(run: RunConfig, source: AbstractSource) -> list[AbstractHook]:
    """The hooks of a run, in the order in which they are called."""
    hooks: list[AbstractHook] = [settings.open() for settings in run.hooks]
    if source.held_out is not None:
        hooks.append(HeldOutEvaluation(source.held_out, run.evaluation))
    return hooks


def _check_held_out(run: RunConfig) -> None:
    share = None if run.responses is None else run.responses.holdout
    if share is not None and run.reference == "cached":
        raise ConfigError(
            f"responses.holdout is {share:g}, and reference is cached, which has "
            f"values of the pairs that are trained on alone: leave reference at auto, or set "
            f"responses.holdout to null"
        )
