"""`diffalign precompute CONFIG.yaml`: what a run needs of its data again and again, computed once.

Of image pairs what the frozen encoders make of images and captions, and where the number of visits
is known what the reference says of them; of responses what the reference says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from diffalign import world
from diffalign.cache.encodings import EncodingsWriter
from diffalign.cache.references import Contents, ReferenceWriter, Shard
from diffalign.cache.shards import check_room
from diffalign.commands import command, override
from diffalign.console import in_bytes, progress, silence_libraries
from diffalign.data.loader import told_of_lost_workers
from diffalign.data.pairs.source import PairSource
from diffalign.heartbeat import Heartbeat
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.devices import DTYPES
from diffalign.processes import only_writer
from diffalign.training import build, checks, encodings
from diffalign.training import reference as cached_reference
from diffalign.training.config import RunConfig


def check(run_config: RunConfig) -> None:
    """Raise ConfigError or ModelError for whatever can be known before data or weights."""
    if _has_images(run_config):
        model = encodings.check_encodable(run_config)
        run_config = dataclasses.replace(run_config, model=model)
    checks.check(_with_cache(run_config) if _knows_reference(run_config) else run_config)


def _has_images(run_config: RunConfig) -> bool:
    return run_config.responses is None


def _knows_reference(run_config: RunConfig) -> bool:
    """Whether values of the reference are computed; of responses nothing else is."""
    data, asked = run_config.data, run_config.reference == "cached"
    if data is None or asked:
        return True
    return run_config.objective.needs_reference and data.visits is not None


def run(
    run_config: RunConfig,
    *,
    pairs_per_shard: int = cached_reference.PAIRS_PER_SHARD,
    named: Sequence[str] = ("CONFIG.yaml",),
) -> ReferenceWriter | EncodingsWriter:
    """Compute what is missing, file by file; started again, it goes on from there.

    Args:
        run_config: the training run. Another one may use the values as well if it agrees in model,
            data, precision, and the settings of every view.
        pairs_per_shard: of each file of reference values.
        named: the words of the command line that made `run_config`, for the command to go on with.

    Returns:
        What wrote the folder; where there are two, that of the encodings.

    Raises:
        BusyError: another process writes in the folder.
        CacheError: the folder holds values of other settings, or the disk has no room for them.
    """
    silence_libraries()
    check(run_config)
    writer: ReferenceWriter | EncodingsWriter | None = None
    cached: dict[str, Any] = {}
    without: list[str] = []
    with ExitStack() as stack:  # the main rank holds the folders for all
        heartbeat = stack.enter_context(Heartbeat(go_on="Start it again: what is done is kept"))
        accelerator = build.build_accelerator(run_config)
        heartbeat.meet()
        console = Console(highlight=False, quiet=not accelerator.is_main_process)
        if _has_images(run_config):
            folder = encodings.folder_of(run_config)
            world.decided(lambda: stack.enter_context(only_writer(folder)))
            writer = _encode(run_config, accelerator, console)
            cached |= {"model.encoders": "cached", "encodings_cache": folder}
            without.append("autoencoder, text encoders and image files")
        if _knows_reference(run_config):
            run_config = _with_cache(_with_encodings(run_config, cached))
            values = cached_reference.folder_of(run_config)
            world.decided(lambda: stack.enter_context(only_writer(values)))
            known = _compute(run_config, accelerator, console, pairs_per_shard=pairs_per_shard)
            writer = writer or known
            cached |= {"reference": "cached", "reference_cache": values}
            without.append("the reference")
    kept = [word for word in named if word.partition("=")[0] not in cached]
    following = [override(key, value) for key, value in cached.items()]
    console.print(
        f"Done: {' and '.join(str(v) for k, v in cached.items() if k.endswith('_cache'))}\n"
        f"Train without running {' and '.join(without)}:\n"
        f"  {command('train', options=[*kept, *following])}",
        markup=False,
        soft_wrap=True,
    )
    if "reference" not in cached and run_config.objective.needs_reference:
        console.print(
            "The reference was not computed: data.visits is null, so that time and noise are new "
            "at every visit. Set it to how often the run sees a pair (its epochs), and start this "
            "again",
            markup=False,
            soft_wrap=True,
        )
    build.end(accelerator)
    assert writer is not None
    return writer


def _encode(run_config: RunConfig, accelerator: Accelerator, console: Console) -> EncodingsWriter:
    """Fill the folder of encodings."""
    model = encodings.check_encodable(run_config)
    source = build.build_source(dataclasses.replace(run_config, model=model), console, skipped=None)
    assert isinstance(source, PairSource), "images come in pairs"
    for line in [f"encoders of {model.describe()}", *source.describe()]:
        console.print(line, markup=False, soft_wrap=True)
    with told_of_lost_workers(run_config.section.reader):
        writer = encodings.compute(run_config, source.pairs_to_encode(), accelerator, console)
    world.wait()
    return writer


def _compute(
    run_config: RunConfig, accelerator: Accelerator, console: Console, *, pairs_per_shard: int
) -> ReferenceWriter:
    """Fill the folder."""
    source = build.build_source(run_config, console, skipped=None)
    samples = source.fixed_samples()
    contents = cached_reference.contents(run_config, source, pairs_per_shard=pairs_per_shard)
    for line in [f"reference of {run_config.model.describe()}", *source.describe()]:
        console.print(line, markup=False, soft_wrap=True)
    with accelerator.main_process_first():
        writer = ReferenceWriter(cached_reference.folder_of(run_config), contents)
    missing = world.decided(writer.missing)  # by one rank: others may have begun to write
    needed = contents.bytes_of(missing)
    console.print(
        f"{', '.join(contents.views)}; {contents.visits} visits: "
        f"{in_bytes(contents.bytes_of(contents.shards))} in {len(contents.shards)} files, "
        f"{in_bytes(needed)} in {len(missing)} files to compute",
        soft_wrap=True,
    )
    fewer = "a smaller data.visits, or data.limit"
    world.decided(lambda: check_room(writer.folder, needed, less=fewer))
    if missing:
        device, dtype = accelerator.device, DTYPES[run_config.training.precision]
        model = run_config.model.load(
            device=device, compute_dtype=dtype, reference="none", trainable=False
        )
        model.network.eval()  # the policy that training begins with is the reference
        shares = missing[world.rank() :: world.size()]
        total = sum(shard.stop - shard.start for shard in shares)
        bar = progress(console, "reference", total, unit="pairs")
        with told_of_lost_workers(run_config.section.reader), bar as advance:
            for shard in shares:
                pairs = range(shard.start, shard.stop)
                batches = samples.sweep([(number, shard.visit) for number in pairs])
                ids, values = _values(run_config.likelihood, model, batches, contents, shard)
                writer.write(shard, ids, values)
                advance(shard.stop - shard.start)
    world.wait()
    for line in source.describe_end():
        console.print(line, markup=False, soft_wrap=True)
    return writer


def _with_encodings(run_config: RunConfig, cached: Mapping[str, Any]) -> RunConfig:
    """The run with the encodings that were just computed, if any were."""
    if not cached:
        return run_config
    model: Any = run_config.model
    return dataclasses.replace(
        run_config,
        model=dataclasses.replace(model, encoders="cached"),
        encodings_cache=cached["encodings_cache"],
    )


def _with_cache(run_config: RunConfig) -> RunConfig:
    return dataclasses.replace(run_config, reference="cached")


@torch.no_grad()
def _values(
    likelihood: AbstractLikelihood,
    model: Any,
    batches: Iterator[Any],
    contents: Contents,
    shard: Shard,
) -> tuple[list[str], dict[str, Tensor]]:
    """Ids of the usable samples of a shard, and view -> one value each."""
    views = contents.views_of(shard.visit)
    ids: list[str] = []
    found = {view: [torch.empty(0)] for view in views}
    for batch in batches:
        if frozenset(batch.views) != views:
            batch = batch.seen_in(views)
        prepared = likelihood.prepare(model, batch)
        for view, values in likelihood.evaluate(model, prepared).items():
            found[view].append(values.float().cpu())
        ids.extend(batch.sample_ids)
    return ids, {view: torch.cat(parts) for view, parts in found.items()}
