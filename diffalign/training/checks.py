"""What can be refused of a run before data or weights are opened."""

from __future__ import annotations

import importlib.util

import torch

from diffalign import components
from diffalign.data.batches import ImageBatch, TokenBatch
from diffalign.data.pairs.columns import PAIR_VIEWS
from diffalign.data.pairs.config import PairConfig
from diffalign.data.responses.config import ResponseConfig
from diffalign.errors import ConfigError
from diffalign.likelihoods.scores import Scores
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.training.config import RunConfig, TrackingConfig
from diffalign.training.optimizers import check_optimizer
from diffalign.training.reference import resolve_reference


def check(run: RunConfig) -> None:
    """Raise ConfigError or ModelError for contradictions, before data or weights are opened."""
    resolve_reference(run)
    _check_source(run)
    _check_objective(run)
    if run.training.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "training.precision fp16 needs a CUDA device and there is none: use bf16 or float32"
        )
    if run.optimizer.warmup_steps >= run.training.optimizer_steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {run.optimizer.warmup_steps}, but training.optimizer_steps "
            f"is {run.training.optimizer_steps}: the peak learning rate would never be reached"
        )
    check_optimizer(run.optimizer)
    _check_trackers(run.tracking)
    run.model.check()
    try:
        run.likelihood.check(run.model)
    except ValueError as error:
        raise ConfigError(f"likelihood {components.kind_of(run.likelihood)}: {error}") from error


def _check_source(run: RunConfig) -> None:
    if run.responses is not None:
        _check_responses(run, run.responses)
        return
    needs_data = run.rollouts is None or run.rollouts.needs_data
    if needs_data and run.data is None:
        raise ConfigError(
            "data is null, and so there is nothing to train on: give data.path, rollouts that "
            "sample everything (d3po, spo), or responses.path for responses"
        )
    if run.data is not None and not needs_data:
        raise ConfigError(
            f"data names {run.data.path}, but rollouts {components.kind_of(run.rollouts)} samples "
            f"all that it trains on: remove the data section, or the rollouts section"
        )
    if run.rollouts is not None and not isinstance(run.model, AbstractDiffusion):
        raise ConfigError(
            f"rollouts {components.kind_of(run.rollouts)} sample images, and the model "
            f"{components.kind_of(run.model)} makes none: remove the rollouts section"
        )
    if run.data is not None and not run.objective.takes_ties:
        _check_plain_pairs(run.data, components.kind_of(run.objective))


def _check_responses(run: RunConfig, responses: ResponseConfig) -> None:
    for name, section in (("data", run.data), ("rollouts", run.rollouts)):
        if section is not None:
            raise ConfigError(
                f"responses names {responses.path}, and there is a section {name} as well: a run "
                f"trains on responses or on images, remove one of them"
            )
    try:
        run.likelihood.data_views(run.objective.views)
    except ValueError as error:
        raise ConfigError(f"likelihood {components.kind_of(run.likelihood)}: {error}") from error


def _check_objective(run: RunConfig) -> None:
    """Source, likelihood and objective must mean the same thing."""
    objective, likelihood = components.kind_of(run.objective), components.kind_of(run.likelihood)
    if run.likelihood.measures not in run.objective.reads:
        raise ConfigError(
            f"likelihood {likelihood} measures a {run.likelihood.measures}, and the objective "
            f"{objective} has a meaning for a {' or a '.join(sorted(run.objective.reads))}: choose "
            f"another likelihood or another objective"
        )
    origin, batch_type, views = _given(run)
    if run.likelihood.batch_type is not batch_type:
        raise ConfigError(
            f"{origin} gives {batch_type.__name__}, and the likelihood {likelihood} takes "
            f"{run.likelihood.batch_type.__name__}: denoising and scores go with pairs of images "
            f"and with rollouts seppo, transition with the other rollouts, tokens with "
            f"responses"
        )
    if views is not None and not run.objective.views <= views:
        raise ConfigError(
            f"{origin} gives the views {', '.join(sorted(views))}, and the objective {objective} "
            f"needs {', '.join(sorted(run.objective.views))}: choose an objective of those views"
        )
    if run.objective.needs_divergence and not getattr(run.likelihood, "divergence", False):
        raise ConfigError(
            f"the objective {objective} compares distributions over the vocabulary: set "
            f"likelihood.divergence to true, with likelihood.kind tokens"
        )
    if isinstance(run.likelihood, Scores) and run.data and run.data.caption_dropout:
        raise ConfigError(
            f"data.caption_dropout is {run.data.caption_dropout}, and a preference model cannot "
            f"judge an image without its caption: set it to 0"
        )


def _given(run: RunConfig) -> tuple[str, type, frozenset[str] | None]:
    """Section that batches come from, their type, and their views where these are known already."""
    if run.responses is not None:
        return "responses", TokenBatch, None
    if run.rollouts is not None:
        name = f"rollouts {components.kind_of(run.rollouts)}"
        return name, run.rollouts.batch_type, run.rollouts.views
    return "data", ImageBatch, frozenset(PAIR_VIEWS)


def _check_plain_pairs(data: PairConfig, objective: str) -> None:
    for name, value, plain in (
        ("ties", data.ties, "drop"),
        ("weighting", data.weighting, "uniform"),
    ):
        if value != plain:
            raise ConfigError(
                f"data.{name} is {value}, and the objective {objective} takes every pair as "
                f"decided and alike: use {plain}, or an objective such as bradley_terry"
            )


def _check_trackers(tracking: TrackingConfig) -> None:
    for tracker in tracking.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"tracking.trackers names {tracker}, which is not installed: "
                f"pip install 'diffalign[{tracker}]', or remove it"
            )
