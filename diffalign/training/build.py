"""From a config to the objects of a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from rich.console import Console

from diffalign import world
from diffalign.data.layout import Layout
from diffalign.data.section import SourceRequest
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import DTYPES
from diffalign.seeding import derive_seed
from diffalign.training.config import RunConfig
from diffalign.training.encodings import open_encodings
from diffalign.training.hooks.configured import open_hooks
from diffalign.training.hooks.held_out import values_of_held_out
from diffalign.training.identity import identity, start_of
from diffalign.training.reference import open_cached, resolve_reference, verify
from diffalign.training.sharding import plugin_of, sharder_of, use_plugin
from diffalign.training.trainer import Trainer

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""How processes may share the work: each holds the whole model."""


def build_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run: its precision, its accumulation, its devices.

    Raises:
        ConfigError: a launcher asks for sharded training, and the run does not.
    """
    # Counting by step and not by the end of a loader: sources have no end.
    accumulation = GradientAccumulationPlugin(
        num_steps=run.training.accumulation, sync_with_dataloader=False, adjust_scheduler=False
    )
    plugin = None if run.training.sharding == "none" else plugin_of(run)
    accelerator = Accelerator(
        fsdp_plugin=plugin,
        cpu=not torch.accelerator.is_available(),
        mixed_precision={"float32": "no"}.get(run.training.precision, run.training.precision),
        gradient_accumulation_plugin=accumulation,
        log_with=list(run.tracking.trackers) or None,
        project_dir=str(run.output),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=world.LONGEST_WAIT),
            DistributedDataParallelKwargs(
                find_unused_parameters=run.model.leaves_weights_idle,
                gradient_as_bucket_view=True,  # no second copy of every gradient
            ),
        ],
    )
    if plugin is not None and accelerator.num_processes > 1:
        use_plugin(accelerator, plugin)
    elif accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerate was launched for {accelerator.distributed_type.value}, and how weights "
            f"are shared out is a setting of the run: set training.sharding=fsdp2, or launch it "
            f"with --multi_gpu, or use diffalign train ... --processes N"
        )
    return accelerator


def end(accelerator: Accelerator) -> None:
    """Close trackers and leave the process group; no trainer may be in use any more.

    The network that gradients are averaged for holds the group. It goes first: threads of a group
    that Python finds only as it shuts down end the process by force.
    """
    accelerator.free_memory()
    accelerator.end_training()


def build_source(
    run: RunConfig, console: Console, *, skipped: Path | None, layout: Layout | None = None
) -> AbstractSource:
    """The batches of a run on this rank; opening it reads no image.

    Args:
        run: the config.
        console: for the progress of rounds; silent on all ranks but the main one.
        skipped: where unusable samples of the data are listed; None keeps them in memory.
        layout: of its samples; None is that of a run which starts on these processes.
    """
    return run.section.open(source_request(run, console, skipped=skipped, layout=layout))


def source_request(
    run: RunConfig,
    console: Console,
    *,
    skipped: Path | None = None,
    layout: Layout | None = None,
) -> SourceRequest[AbstractModel, AbstractLikelihood]:
    """What the section that batches come from has to know of a run; see `build_source`."""
    layout = layout or start_of(run)
    return SourceRequest(
        model=run.model,
        likelihood=run.likelihood,
        objective=run.objective,
        output=run.output,
        run_seed=run.seed,
        layout=layout,
        settings=repr(identity(run, layout)),
        skipped=skipped,
        console=console,
        encodings=functools.partial(open_encodings, run) if run.model.takes_encodings else None,
    )


def build_trainer(
    run: RunConfig,
    accelerator: Accelerator,
    source: AbstractSource,
    console: Console,
    *,
    layout: Layout | None = None,
) -> Trainer:
    """Load the weights and assemble the trainer.

    Args:
        run: the config.
        accelerator: of the run.
        source: of its batches.
        console: silent on all ranks but the main one.
        layout: as `build_source` got it.

    Raises:
        CacheError: the reference was computed under other settings, or not at all.
    """
    known = open_cached(run, source) if run.reference == "cached" else None
    # Samples are data; what the global generator is left with is LoRA dropout, one stream per rank.
    torch.manual_seed(derive_seed(run.seed, "process", world.rank()))
    reference = resolve_reference(run)
    sharder = sharder_of(run, accelerator)
    more: dict[str, Any] = {} if sharder is None else {"sharder": sharder}
    model = run.model.load(
        device=accelerator.device,
        compute_dtype=DTYPES[run.training.precision],
        reference="none" if reference == "cached" else reference,
        **more,
    )
    of_held_out = None
    if known is not None:  # until a step or a checkpoint moves the policy it is the reference
        verify(run, source, model, known)
        if source.held_out is not None:
            of_held_out = values_of_held_out(source.held_out, run.evaluation, run.likelihood, model)
    return Trainer(
        accelerator=accelerator,
        model=model,
        source=source,
        likelihood=run.likelihood,
        objective=run.objective,
        precomputed_reference=known,
        optimizer=run.optimizer,
        training=run.training,
        layout=layout or start_of(run),
        identity={
            **identity(run, layout),
            "model.fingerprint": model.fingerprint(),
            "data.fingerprint": source.fingerprint(),
        },
        output=run.output,
        console=console,
        hooks=open_hooks(run, source, of_held_out),
    )
