"""What can be refused of a run before data or weights are opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from diffalign import components
from diffalign.data.pairs.index import bucket_sizes
from diffalign.data.section import RunParts
from diffalign.errors import ConfigError
from diffalign.objectives.base import Measured
from diffalign.training.config import RunConfig, TrackingConfig
from diffalign.training.encodings import check_encodings
from diffalign.training.hooks.configured import check_hooks
from diffalign.training.reference import resolve_reference
from diffalign.training.sharding import check_sharding


def check(run: RunConfig) -> None:
    """Raise ConfigError or ModelError for contradictions, before data or weights are opened."""
    if run.preset is not None:
        raise ConfigError(
            f"preset is {run.preset}, and nothing was chosen for it: load the run with "
            f"diffalign.training.presets.load, as the command line does"
        )
    resolve_reference(run)
    run.section.check(RunParts(model=run.model, likelihood=run.likelihood, objective=run.objective))
    _check_objective(run)
    _check_tokens(run)
    _check_users(run)
    check_encodings(run)
    if run.training.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "training.precision fp16 needs a CUDA device and there is none: use bf16 or float32"
        )
    if run.optimizer.warmup_steps >= run.training.optimizer_steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {run.optimizer.warmup_steps}, but training.optimizer_steps "
            f"is {run.training.optimizer_steps}: the peak learning rate would never be reached. "
            f"Take more steps, or fewer of warm-up: optimizer.warmup_steps="
            f"{run.training.optimizer_steps // 10}"
        )
    _check_optimizer(run)
    check_sharding(run)
    _check_trackers(run.tracking)
    check_hooks(run)
    run.model.check()
    _check_sizes(run)
    try:
        run.likelihood.check(run.model)
    except ValueError as error:
        raise ConfigError(f"likelihood {components.kind_of(run.likelihood)}: {error}") from error


def _check_users(run: RunConfig) -> None:
    """A model of several tastes must be told whose each verdict is, and no other can be."""
    column = None if run.data is None else run.data.users
    if run.model.tells_users and column is None:
        raise ConfigError(
            f"model: {run.model.describe()}, and data.users is null: name the column that says who "
            f"gave each verdict, such as user_id"
        )
    if column is not None and not run.model.tells_users:
        raise ConfigError(
            f"data.users is {column}, and this model has one taste for all: leave it out, or set "
            f"model.kind to clip_reward and model.head.kind to pal"
        )


def _check_tokens(run: RunConfig) -> None:
    """Samples are cut by length where they have one, and where no process waits for another in
    every forward pass."""
    tokens, training = run.training.tokens_per_device, run.training
    if tokens is None:
        return
    if run.responses is None:
        made = "rounds, whose rows are taken in equal numbers"
        if run.model.makes == "images":
            made = "images, of which all in a forward pass have one size"
        raise ConfigError(
            f"training.tokens_per_device is {tokens}, and {run.section.origin} gives {made}: set "
            f"training.samples_per_device instead"
        )
    if training.sharding != "none":
        raise ConfigError(
            f"training.tokens_per_device is {tokens}, which lets each process do as many forward "
            f"passes as its samples take, and with training.sharding {training.sharding} all wait "
            f"for each other in each: set one of them to its default"
        )


def _check_optimizer(run: RunConfig) -> None:
    run.optimizer.check()
    kind = components.kind_of(run.optimizer)
    if run.optimizer.averages and run.training.ema_decay is not None:
        raise ConfigError(
            f"training.ema_decay is {run.training.ema_decay}, and optimizer.kind {kind} averages "
            f"the weights itself: set training.ema_decay to null"
        )
    if run.model.own_rates and not run.optimizer.takes_own_rates:
        key, rate = next(iter(run.model.own_rates.items()))
        raise ConfigError(
            f"{key} is {rate:g}, and optimizer.kind {kind} finds one step size for all that "
            f"trains: set {key} to null, or take another optimiser"
        )


def _check_sizes(run: RunConfig) -> None:
    """The model must take images of the sizes of the run."""
    data = run.data
    if data is None:
        return
    side = data.resolution
    for size in bucket_sizes(side) if data.buckets else [(side, side)]:
        try:
            run.model.check_image_size(size)
        except ValueError as error:
            more = ", and data.buckets is true" if data.buckets else ""
            raise ConfigError(f"data.resolution is {side}{more}: {error}") from error


def _check_objective(run: RunConfig) -> None:
    """Source, likelihood and objective must mean the same thing."""
    objective, likelihood = components.kind_of(run.objective), components.kind_of(run.likelihood)
    section = run.section
    try:
        read = run.likelihood.data_views(run.objective.views)
    except ValueError as error:
        raise ConfigError(f"likelihood {likelihood}: {error}") from error
    if run.likelihood.measures not in run.objective.reads:
        raise ConfigError(
            f"likelihood {likelihood} measures a {run.likelihood.measures}, and the objective "
            f"{objective} has a meaning for a {' or a '.join(sorted(run.objective.reads))}: choose "
            f"another likelihood or another objective"
        )
    if run.likelihood.batch_type is not section.batch_type:
        raise ConfigError(
            f"{section.origin} gives {section.batch_type.__name__}, and the likelihood "
            f"{likelihood} takes {run.likelihood.batch_type.__name__}: denoising and scores go "
            f"with pairs of images and with rollouts seppo, transition with the other rollouts, "
            f"tokens with responses"
        )
    if section.views is not None and not read <= section.views:
        raise ConfigError(
            f"{section.origin} gives the views {', '.join(sorted(section.views))}, and the "
            f"objective {objective} needs {', '.join(sorted(run.objective.views))}: choose an "
            f"objective of those views"
        )
    if run.objective.needs_divergence and not run.likelihood.gives_divergence:
        raise ConfigError(
            f"the objective {objective} compares distributions over the vocabulary: set "
            f"likelihood.divergence to true, with likelihood.kind tokens"
        )
    for measured in sorted(run.objective.needs_measured - run.likelihood.gives_measured):
        reads, settings = _MEASURED[measured]
        raise ConfigError(f"the objective {objective} reads {reads}: set {settings}")
    if run.likelihood.runs_reference and not run.objective.needs_reference:
        raise ConfigError(
            f"likelihood.inversion walks with the reference, and the objective {objective} has "
            f"none: set likelihood.inversion.by to policy"
        )
    if run.likelihood.weighs_rows and "weight" not in run.objective.takes_strength:
        raise ConfigError(
            f"likelihood.snr_bias lets pairs count by their time, and the objective {objective} "
            f"lets all count alike: set it to null, or choose an objective of pairs"
        )
    if run.training.samples_per_device < run.likelihood.least_samples:
        raise ConfigError(
            f"training.samples_per_device is {run.training.samples_per_device}, and likelihood "
            f"{likelihood} measures each sample next to others (mismatched): set it to "
            f"{run.likelihood.least_samples} or more"
        )
    if run.likelihood.needs_captions and section.caption_dropout:
        raise ConfigError(
            f"data.caption_dropout is {section.caption_dropout}, and a preference model cannot "
            f"score an image without its caption: set it to 0"
        )


_MEASURED: Mapping[Measured, tuple[str, str]] = {
    "distance": (
        "how far the predictions of policy and reference are apart",
        "likelihood.distance to true, with likelihood.kind denoising",
    ),
    "embedding": (
        "which samples are about the same",
        "likelihood.embedding to prompts, with likelihood.kind denoising",
    ),
    "typicality": (
        "how typical responses are of the policy",
        "likelihood.typicality to true, with likelihood.kind tokens",
    ),
    "tokens": (
        "each token of a response by itself",
        "likelihood.each_token to true, with likelihood.kind tokens",
    ),
}
"""What each is, and how a likelihood is told to measure it."""


def _check_trackers(tracking: TrackingConfig) -> None:
    for tracker in tracking.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"tracking.trackers names {tracker}, which is not installed: "
                f"pip install 'diffalign[{tracker}]', or remove it"
            )
