"""What the policy of a run is compared with, and the values of a reference computed in advance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import components, world
from diffalign.blocks import digest
from diffalign.cache.references import REFERENCE_VALUES, CachedReference, Contents
from diffalign.data.layout import Layout
from diffalign.data.pairs.source import PairSource
from diffalign.data.score_columns import ScoreKey, ScorerIdentity, ScoreRow, write_score_column
from diffalign.data.source import AbstractSource
from diffalign.errors import CacheError, ConfigError
from diffalign.models.base import AbstractTrainable, ReferenceKind
from diffalign.models.devices import evaluation_mode
from diffalign.seeding import derive_seed
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
            f"the reference can be computed in advance for image pairs and for responses of a data "
            f"set, and {section.origin} samples from the policy as it trains: what the reference "
            f"says of these samples is not known before. Leave reference at auto"
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
        varying=_varying(run),
    )


def _varying(run: RunConfig) -> tuple[str, ...] | None:
    """As `Contents` has it; nothing where that says it of itself, as of responses."""
    varying = run.section.varying_views(run.objective.views)
    plain = {view for view in run.objective.views if View.parse(view).condition}
    return None if varying == plain else tuple(sorted(varying))


def describe_visits(run: RunConfig, source: AbstractSource, layout: Layout) -> list[str]:
    """One line on how many visits of a sample differ, where that is limited.

    Args:
        run: the config.
        source: of its batches.
        layout: of its samples.

    Raises:
        ConfigError: the run takes more of them than the reference was computed for.
    """
    most = source.most_visits(run.training.optimizer_steps * layout.micro_batches)
    line = run.section.describe_visits(most, reference_is_cached=run.reference == "cached")
    return [line] if line else []


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


def write_scores(run: RunConfig, source: PairSource, path: Path) -> int:
    """Write what the reference says of the images of pairs as a file of scores (`data.scores`).

    A score is the mean over visits, and over the pairs that an image is in, of the run's
    likelihood; its deviation is the standard deviation of those.

    Args:
        run: whose values of the reference were computed.
        source: of its pairs.
        path: of the file.

    Returns:
        How many images have a score.

    Raises:
        CacheError: see `CachedReference.open`.
    """
    known = open_cached(run, source)
    values: dict[ScoreKey, list[float]] = {}
    for sample_id, keys in source.image_keys():
        of_views = known.all_of(sample_id)
        for view, key in keys.items():
            values.setdefault(key, []).extend(of_views.get(view, []))
    scorer = ScorerIdentity(
        kind="reference",
        settings={"likelihood": components.kind_of(run.likelihood)},
        fingerprint=f"reference-{digest(_fingerprint(run, source))}",
        repeats=run.section.visits_in_advance(run.objective.views),
    )
    rows = [
        ScoreRow(
            image=image,
            prompt=prompt,
            score=statistics.fmean(numbers) if numbers else None,
            deviation=statistics.stdev(numbers) if len(numbers) > 1 else None,
            problem=None if numbers else "the pair could not be used",
        )
        for (image, prompt), numbers in values.items()
    ]
    write_score_column(path, scorer, rows)
    return len(rows)


AGREEMENT = {"float32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}
"""Relative difference at most between a value that was computed in advance and the same computed
now, by `training.precision`. Two kernels in bf16 move a margin at DiffusionDPO's scale of 2500 by
0.01 to 0.03, an error by up to 1.2e-5 next to values of 0.01 and more: an eighth of the bound,
which was not tried on a GPU yet; fp16 is eight times finer. Another model, time or noise changes
values by tenths."""
_COMPARED = 64


def verify(
    run: RunConfig, source: AbstractSource, model: AbstractTrainable, known: CachedReference
) -> None:
    """Compute some random values anew, by the model as it was loaded, and compare.

    The ranks share them. Nothing of the run changes.

    Args:
        run: whose reference is cached.
        source: of its batches.
        model: freshly loaded: the policy that training begins with is the reference.
        known: the values to be compared.

    Raises:
        CacheError: one differs; the first sample and both of its values are named.
    """
    samples, visits = source.fixed_samples(), run.section.visits_in_advance(run.objective.views)
    chosen = [derive_seed(run.seed, "compared", n) for n in range(_COMPARED)]
    rows = dict.fromkeys((seed // visits % len(samples), seed % visits) for seed in chosen)
    mine = [row for n, row in enumerate(rows) if n % world.size() == world.rank()]
    said = ""
    before = model.evaluations
    with torch.no_grad(), evaluation_mode(model.network):
        for batch in samples.sweep(mine):
            anew = run.likelihood.evaluate(model, run.likelihood.prepare(model, batch))
            said = said or _difference(run, batch, anew, known(batch.sample_ids, batch.visits))
    model.evaluations = before
    said = next((each for each in world.gather(said) if each), "")
    world.decided(lambda: _refuse(said))


def _refuse(said: str) -> None:
    if said:
        raise CacheError(said)


def _difference(
    run: RunConfig, batch: Any, anew: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> str:
    """A sentence about the first value of a batch that is not what it was; empty where all are."""
    bound = AGREEMENT[run.training.precision]
    for view, before in known.items():
        now = anew[view].float().cpu()
        scale = before.abs().clamp(min=run.likelihood.rounds_below)
        # Not "larger than": what is not finite differs.
        for row in (~((now - before).abs() <= bound * scale)).nonzero().flatten().tolist():
            folder = folder_of(run)
            return (
                f"{folder}: the reference's value of {batch.sample_ids[row]}, visit "
                f"{batch.visits[row]}, {view}, is {before[row].item():.8g} there and comes out as "
                f"{now[row].item():.8g} now, more than {bound:g} apart: the model, the data or "
                f"what computes with them is not what it was. Remove the folder and compute it "
                f"again with {REFERENCE_VALUES.compute(folder)}"
            )
    return ""


def _fingerprint(run: RunConfig, source: AbstractSource) -> Mapping[str, Any]:
    """All that the values of the run's views depend on, and nothing else: another objective, length
    or adapter may use them."""
    views = run.objective.views
    return {
        **run.model.reference_settings(),
        "training.precision": run.training.precision,
        "data": source.fingerprint(),
        "reading of rows": READING,
        **run.section.defining_settings(views),
        "likelihood.kind": components.kind_of(run.likelihood),
        **{f"likelihood.{key}": value for key, value in run.likelihood.defining_settings().items()},
        **({"seed": run.seed} if run.section.varying_views(views) else {}),
    }
