"""From a config to the objects of a run; whatever can be refused is refused before weights load."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from rich.console import Console

from diffalign import components, config, world
from diffalign.data.batches import ImageBatch, TokenBatch
from diffalign.data.pairs.columns import PAIR_VIEWS
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.source import PairSource
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.source import ResponseSource
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.likelihoods.scores import Scores
from diffalign.likelihoods.transition import Transition
from diffalign.models.base import AbstractModel, ReferenceKind
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.precision import DTYPES
from diffalign.models.preference.step_aware import StepAwarePreference
from diffalign.models.vlm.config import VLM
from diffalign.objectives.base import AbstractObjective
from diffalign.rollouts.base import AbstractRollouts, RunContext
from diffalign.seeding import TimestepSampling, derive_seed
from diffalign.training import reference as cached_reference
from diffalign.training.optimizers import OptimizerConfig, check_optimizer
from diffalign.training.trainer import Trainer, TrainingConfig

LONGEST_WAIT = timedelta(days=1)
"""How long a rank waits for the others: sampling a round can take hours, and not every rank is
equally fast. The default of ten minutes would end the run."""

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""How processes may share the work: each holds the whole model."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where figures go besides the run folder's own `metrics.jsonl`."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Any of them; each needs its extra. Credentials come from the environment alone."""
    project: str = "diffalign"
    """Project name for wandb and trackio."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    output: Path
    """The run folder; everything the run writes lies below it."""
    seed: int = 0
    """All randomness derives from it and from its sample; an adapter starts from `lora.seed`."""
    model: AbstractModel
    """What is trained, and where its weights come from."""
    reference: Literal["auto", "adapter_off", "frozen_copy", "past_policy", "cached", "none"] = (
        "auto"
    )
    """What the policy is compared with: the same network with its adapter off (LoRA), a frozen
    copy (full fine-tuning), an earlier policy (which one, `rollouts.reference` says; without
    rollouts the one that `model.lora.start` makes), or nothing. `auto` takes the cheapest that
    objective, rollouts and model allow. `cached` is what auto would take for responses, as
    `diffalign precompute` wrote it: no reference is run or held."""
    reference_cache: Path | None = None
    """Folder of those values, which other runs may share; null is `cache/references` below
    `output`."""
    data: PairConfig | None = None
    """The preference data of images; null where all is sampled, or responses are preferred."""
    responses: ResponseConfig | None = None
    """The preference data of responses about images; null for images."""
    rollouts: AbstractRollouts | None = None
    """How samples of the policy itself become batches; null trains on the data alone."""
    likelihood: AbstractLikelihood
    """How probable the model finds a sample."""
    objective: AbstractObjective
    """What is wanted of those probabilities."""
    optimizer: OptimizerConfig
    """Optimiser, learning rate and schedule."""
    training: TrainingConfig
    """Length, batch, precision, checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """TensorBoard, wandb, trackio."""


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
        cached_reference.check(run)
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


def build_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run: its precision, its accumulation, its devices.

    Raises:
        ConfigError: a launcher asks for sharded training, which checkpoints do not know yet.
    """
    # Counting by step and not by the end of a loader: sources have no end.
    accumulation = GradientAccumulationPlugin(
        num_steps=run.training.accumulation, sync_with_dataloader=False, adjust_scheduler=False
    )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision={"float32": "no"}.get(run.training.precision, run.training.precision),
        gradient_accumulation_plugin=accumulation,
        log_with=list(run.tracking.trackers) or None,
        project_dir=str(run.output),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            DistributedDataParallelKwargs(
                find_unused_parameters=run.model.leaves_weights_idle,
                gradient_as_bucket_view=True,  # no second copy of every gradient
            ),
        ],
    )
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerate was launched for {accelerator.distributed_type.value}, and training is "
            f"replicated on every device so far: launch it with --multi_gpu, or use "
            f"diffalign train ... --processes N"
        )
    return accelerator


def build_source(run: RunConfig, console: Console, *, skipped: Path | None) -> AbstractSource:
    """The batches of a run on this rank; opening it reads no image.

    Args:
        run: the config.
        console: for the progress of rounds; silent on all ranks but the main one.
        skipped: where unusable samples of the data are listed; None keeps them in memory.
    """
    if run.responses is not None:
        return _open_responses(run, run.responses, skipped=skipped)

    def open_data(views: frozenset[str]) -> PairSource:
        assert run.data is not None, "check() was called"
        assert isinstance(run.model, (AbstractDiffusion, StepAwarePreference)), "by the likelihood"
        return PairSource.open(
            run.data,
            views=views,
            run_seed=run.seed,
            pairs_per_device=run.training.samples_per_device,
            timesteps=getattr(run.likelihood, "timesteps", TimestepSampling()),
            schedule_length=run.model.noising().schedule_length,
            skipped=skipped,
        )

    if run.rollouts is None:
        return open_data(run.objective.views)
    model, likelihood = run.model, run.likelihood
    assert isinstance(model, AbstractDiffusion), "check() was called"
    return run.rollouts.open(
        RunContext(
            folder=run.output / "rounds",
            run_seed=run.seed,
            model=model,
            settings=repr(identity(run)),
            samples_per_device=run.training.samples_per_device,
            accumulation=run.training.accumulation,
            process=likelihood.process if isinstance(likelihood, Transition) else None,
            console=console,
            open_data=open_data,
        )
    )


def _open_responses(
    run: RunConfig, responses: ResponseConfig, *, skipped: Path | None
) -> ResponseSource:
    assert isinstance(run.model, VLM), "check() was called"
    longest = min(responses.max_length, run.model.context or responses.max_length)
    return ResponseSource.open(
        replace(responses, max_length=longest),
        views=run.likelihood.data_views(run.objective.views),
        served=run.objective.views,
        run_seed=run.seed,
        samples_per_device=run.training.samples_per_device,
        processor=run.model.processor(),
        skipped=skipped,
        pairs_for=None if run.objective.takes_unpaired else components.kind_of(run.objective),
    )


def build_trainer(
    run: RunConfig, accelerator: Accelerator, source: AbstractSource, console: Console
) -> Trainer:
    """Load the weights and assemble the trainer.

    Raises:
        CacheError: the reference was computed under other settings, or not at all.
    """
    known = None
    if run.reference == "cached":
        assert isinstance(source, ResponseSource), "check() was called"
        known = cached_reference.open_cached(run, source)
    # Samples are data; what the global generator is left with is LoRA dropout, one stream per rank.
    torch.manual_seed(derive_seed(run.seed, "process", world.rank()))
    reference = resolve_reference(run)
    model = run.model.load(
        device=accelerator.device,
        compute_dtype=DTYPES[run.training.precision],
        reference="none" if reference == "cached" else reference,
    )
    return Trainer(
        accelerator=accelerator,
        model=model,
        source=source,
        likelihood=run.likelihood,
        objective=run.objective,
        precomputed_reference=known,
        optimizer=run.optimizer,
        training=run.training,
        identity={
            **identity(run),
            "model.fingerprint": model.fingerprint(),
            "data.fingerprint": source.fingerprint(),
        },
        output=run.output,
        console=console,
    )


def identity(run: RunConfig) -> dict[str, Any]:
    """What two runs must share for a checkpoint of one to serve the other, by dotted key."""
    flat = _flatten(config.to_dict(run))
    flat["reference"] = resolve_reference(run)
    flat["processes"] = world.size()
    free = {
        "output",
        "reference_cache",
        "model.path",  # the fingerprints say what lies there
        "model.lora.start",
        "model.base.path",
        "data.path",
        "responses.path",
        "responses.image_folder",
        "rollouts.prompts",
        "rollouts.prompts.file",
        "rollouts.trajectories",
        "rollouts.preferences",
        "data.workers",
        "data.max_bad_fraction",
        "responses.workers",
        "responses.max_bad_fraction",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.log_every",
        "training.max_bad_steps",
    }
    if run.optimizer.schedule == "constant":
        free.add("training.optimizer_steps")
    return {k: v for k, v in flat.items() if k not in free and not k.startswith("tracking.")}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plan(run: RunConfig, processes: int) -> list[tuple[str, str]]:
    """What the run is about to do on so many processes, as pairs of heading and sentence."""
    training, optimizer = run.training, run.optimizer
    batch = training.samples_per_device * training.accumulation * processes
    lines = [
        ("model", run.model.describe()),
        ("reference", resolve_reference(run)),
        ("rollouts", "" if run.rollouts is None else run.rollouts.describe()),
        ("likelihood", run.likelihood.describe()),
        ("objective", f"{components.kind_of(run.objective)}{_scale(run)}"),
        ("loss", run.objective.note()),
        (
            "batch",
            f"{batch} samples per step = {training.samples_per_device} per device x "
            f"{training.accumulation} accumulated x {processes} processes",
        ),
        (
            "optimiser",
            f"{optimizer.kind}, lr {optimizer.lr:g} as written, {optimizer.schedule} after "
            f"{optimizer.warmup_steps} warm-up steps, clipped at {optimizer.max_grad_norm}",
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
