"""What the policy of a run is compared with, and the values of a reference computed in advance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffalign import components
from diffalign.cache.references import CachedReference, Contents
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.models.base import ReferenceKind
from diffalign.training.config import RunConfig
from diffalign.views import View

PAIRS_PER_SHARD = 4096
READING = 2
"""Goes up when rows become other tokens than before. 2: each response under its own conversation,
next to its own images, and with one end token."""


Reference = ReferenceKind | Literal["cached"]


def resolve_reference(run: RunConfig) -> Reference:
    """The reference strategy of a run.

    Raises:
        ConfigError: the setting contradicts the objective or the kind of training.
    """
    adapter = run.model.trains_adapter
    objective = components.kind_of(run.objective)
    rule = "initial" if run.rollouts is None else run.rollouts.reference
    continues = run.model.continues_adapter
    if run.reference == "auto":
        if not run.objective.needs_reference:
            return "none"
        if rule != "initial" or continues:
            return "past_policy"
        return "adapter_off" if adapter else "frozen_copy"
    if run.reference == "cached":
        check_cached(run)
        return "cached"
    if run.reference == "none" and run.objective.needs_reference:
        raise ConfigError(
            f"reference is none, but the objective {objective} compares with a reference: "
            f"use auto, adapter_off (LoRA) or frozen_copy"
        )
    if run.reference == "adapter_off" and not adapter:
        raise ConfigError(
            "reference is adapter_off, but model.lora is null: full fine-tuning changes the "
            "network itself. Use reference: frozen_copy, or give model.lora a rank"
        )
    may_stay = rule == "initial" and continues  # what is continued is an earlier policy itself
    if (run.reference == "past_policy") != (rule != "initial") and not may_stay:
        raise ConfigError(
            f"reference is {run.reference}, and rollouts.reference is {rule}: an earlier policy is "
            f"the reference where rollouts.reference is latest or uniform, or model.lora.start is "
            f"given, and only there. Leave reference at auto"
        )
    return run.reference


def folder_of(run: RunConfig) -> Path:
    """Where the reference values of a run lie."""
    return run.reference_cache or run.output / "cache/references"


def check_cached(run: RunConfig) -> None:
    """Raise ConfigError where the reference cannot be known before training."""
    section = run.section
    if not section.kept_in_advance:
        raise ConfigError(
            "the reference can be computed in advance for responses (a section responses): "
            "denoising errors depend on noise that is sampled anew at every visit, and keeping "
            "several samples of them is not offered yet. Leave reference at auto"
        )
    if not run.objective.needs_reference:
        raise ConfigError(
            f"the objective {components.kind_of(run.objective)} compares with no reference: leave "
            f"reference at auto"
        )
    try:
        run.likelihood.check_known_in_advance(run.objective.views)
    except ValueError as error:
        raise ConfigError(f"reference: {error}. Leave reference at auto") from error
    section.visits_in_advance(run.objective.views)


def contents(
    run: RunConfig, source: AbstractSource, *, pairs_per_shard: int = PAIRS_PER_SHARD
) -> Contents:
    """What `diffalign precompute` computes for a run.

    Raises:
        ConfigError: its samples are not the same at every visit, or its rows are unpaired.
    """
    samples = source.fixed_samples()
    return Contents(
        fingerprint=_fingerprint(run, source),
        views=tuple(sorted(run.objective.views)),
        visits=run.section.visits_in_advance(run.objective.views),
        pairs=len(samples),
        pairs_per_shard=pairs_per_shard,
    )


def open_cached(run: RunConfig, source: AbstractSource) -> CachedReference:
    """The values that were computed for a run, or for one that agrees in all they depend on.

    Raises:
        CacheError: see `CachedReference.open`.
        ConfigError: its samples are not the same at every visit, or its rows are unpaired.
    """
    source.fixed_samples()
    return CachedReference.open(
        folder_of(run),
        fingerprint=_fingerprint(run, source),
        views=run.objective.views,
        visits=run.section.visits_in_advance(run.objective.views),
    )


def _fingerprint(run: RunConfig, source: AbstractSource) -> Mapping[str, Any]:
    """All that the values of the run's views depend on, and nothing else: another objective, length
    or adapter may use them."""
    views = run.objective.views
    return {
        "model (weights, start of the adapter, processor)": run.model.policy_fingerprint(),
        "training.precision": run.training.precision,
        "data": source.fingerprint(),
        "reading of rows": READING,
        **run.section.defining_settings(views),
        "likelihood.kind": components.kind_of(run.likelihood),
        **{f"likelihood.{key}": value for key, value in run.likelihood.defining_settings().items()},
        **({"seed": run.seed} if any(View.parse(view).condition for view in views) else {}),
    }
