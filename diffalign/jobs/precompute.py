"""`diffalign precompute CONFIG.yaml`: what a run needs of its data again and again, computed once.

Of image pairs what the frozen encoders make of images and captions, and where the number of visits
is known what the reference says of them; of responses what the reference says of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from diffalign import blocks, sessions
from diffalign.blocks import AbstractPlan, Block
from diffalign.cache.encodings import EncodingShapes, EncodingsWriter
from diffalign.cache.references import Contents, ReferenceWriter, Shard
from diffalign.cache.shards import check_room
from diffalign.commands import command, override
from diffalign.console import in_bytes, silence_libraries
from diffalign.data.loader import told_of_lost_workers
from diffalign.data.pairs.source import PairSource
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import ConfigError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.likelihoods.pair_numbers import PAIR_NUMBERS
from diffalign.models.devices import DTYPES, choose_device
from diffalign.training import build, checks, encodings
from diffalign.training import reference as cached_reference
from diffalign.training.config import RunConfig
from diffalign.training.encodings import EncodingsPlan
from diffalign.training.pair_numbers import PairNumbersPlan


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
    sharing: Sharing | None = None,
    scores: Path | None = None,
) -> ReferenceWriter | EncodingsWriter | None:
    """Compute what is missing, file by file; started again, it goes on from there.

    Args:
        run_config: the training run. Another one may use the values as well if it agrees in model,
            data, precision, and the settings of every view.
        pairs_per_shard: of each file of reference values.
        named: the words of the command line that made `run_config`, for the command to go on with.
        sharing: which processes do it; None is this one.
        scores: file of scores that gets what the reference says of each image, or file of numbers
            that gets what the model says of each pair of responses; None for none.

    Returns:
        What wrote the folder; where there are two, that of the encodings. None where other shards
        still have to compute theirs.

    Raises:
        BusyError: another command writes in the folder.
        CacheError: the folder holds values of other settings, or the disk has no room for them.
    """
    silence_libraries()
    sharing = sharing or Sharing()
    _refuse_launchers()
    check(run_config)
    if scores is not None:
        _check_scores(run_config, scores)
    sharing.engine.check("auto")
    console = Console(highlight=False)
    writer: ReferenceWriter | EncodingsWriter | None = None
    cached: dict[str, Any] = {}
    without: list[str] = []
    with ExitStack() as stack:
        if _has_images(run_config):
            folder = encodings.folder_of(run_config)
            session = stack.enter_context(sessions.held(folder, shard=sharing.shard))
            writer = _encode(run_config, session, sharing, console)
            if writer is None:
                if _knows_reference(run_config):
                    console.print("Start it again then: values of the reference come next")
                return None
            if sharing.shard is not None:
                session.close()  # others go on too
            cached |= {"model.encoders": "cached", "encodings_cache": folder}
            without.append("autoencoder, text encoders and image files")
        elif scores is not None:
            session = stack.enter_context(
                sessions.held(scores.parent, of=scores.name, shard=sharing.shard)
            )
            if not _rank(run_config, scores, session, sharing, console):
                console.print("Start it again then: values of the reference come next")
                return None
            if sharing.shard is not None:
                session.close()
        if _knows_reference(run_config):
            run_config = _with_cache(_with_encodings(run_config, cached))
            values = cached_reference.folder_of(run_config)
            session = stack.enter_context(sessions.held(values, shard=sharing.shard))
            known = _compute(run_config, session, sharing, console, pairs_per_shard)
            if known is None:
                return None
            writer = writer or known
            if scores is not None and _has_images(run_config):
                source = build.build_source(run_config, Console(quiet=True), skipped=None)
                assert isinstance(source, PairSource), "images come in pairs"
                count = cached_reference.write_scores(run_config, source, scores)
                console.print(
                    f"scores of {count:,} images by the reference, in {scores}: data.scores of a "
                    f"run reads them as {{file: {scores}, scorer: reference}}",
                    markup=False,
                    soft_wrap=True,
                )
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
    assert writer is not None
    return writer


def _check_scores(run_config: RunConfig, scores: Path) -> None:
    if _has_images(run_config) and not _knows_reference(run_config):
        raise ConfigError(
            f"--scores {scores} takes what a reference says of the images of pairs, and this run "
            f"has none that is known in advance: give data, data.visits and an objective that "
            f"compares with a reference, such as dpo"
        )
    if scores.suffix != ".parquet":
        raise ConfigError(f"--scores {scores}: a file of scores is named .parquet")


def _refuse_launchers() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "precompute was started by a launcher of several processes, such as torchrun or "
            "accelerate, and shares its work without one: start it once with --processes N, or "
            "once for each share with --shard I/N"
        )


def encodings_plan(run_config: RunConfig, shapes: EncodingShapes) -> EncodingsPlan:
    """The encodings of a run, as blocks, of encoders that make these; no weights are read."""
    return EncodingsPlan(run_config, _pairs_of(run_config).pairs_to_encode(), shapes)


def _pairs_of(run_config: RunConfig) -> PairSource:
    model = encodings.check_encodable(run_config)
    source = build.build_source(
        dataclasses.replace(run_config, model=model), Console(quiet=True), skipped=None
    )
    assert isinstance(source, PairSource), "images come in pairs"
    return source


def _encode(
    run_config: RunConfig, session: sessions.Session, sharing: Sharing, console: Console
) -> EncodingsWriter | None:
    """Fill the folder of encodings; None where other shards still have to."""
    source, model = _pairs_of(run_config), encodings.check_encodable(run_config)
    for line in [f"encoders of {model.describe()}", *source.describe()]:
        console.print(line, markup=False, soft_wrap=True)
    encoders = encodings.load(run_config, choose_device("auto"))
    shapes = encodings.shapes_of(model, encoders)
    used = encoders if sharing.engine.is_here else shapes
    del encoders  # workers load their own
    pairs_to_encode = source.pairs_to_encode()
    with told_of_lost_workers(run_config.section.reader):
        plan = session.begin(lambda: EncodingsPlan(run_config, pairs_to_encode, used))
        layout, pairs = plan.layout, plan.layout.pairs
        needed = layout.bytes_of([block.work for block in session.pending])
        console.print(
            f"encodings of {len(pairs):,} pairs ({' and '.join(pairs.views)}, {len(pairs.ways)} "
            f"ways to see an image) and {len(pairs.prompts):,} captions: {in_bytes(layout.bytes)} "
            f"in {len(layout.shards)} files, {in_bytes(needed)} in {len(session.pending)} files to "
            f"compute",
            soft_wrap=True,
        )
        plan.check_room(session.pending)
        make = blocks.Recipe(encodings_plan, run_config, {"shapes": shapes})
        if not do_blocks(session, plan, make, sharing, console):
            return None
    for reason, count in plan.unusable(session.pending).items():
        console.print(f"pairs that cannot be used: {count:,} {reason}", markup=False)
    return plan.writer


class ReferencePlan(AbstractPlan):
    """Values of a run's reference, as blocks: a file each."""

    title, unit = "reference", "pairs"
    is_result = True

    def __init__(self, run_config: RunConfig, pairs_per_shard: int) -> None:
        """Begin, or go on with what was started.

        Args:
            run_config: the run.
            pairs_per_shard: of each file.

        Raises:
            CacheError: the folder holds values of other settings.
        """
        self._run = run_config
        self.source = build.build_source(run_config, Console(quiet=True), skipped=None)
        self._samples = self.source.fixed_samples()
        self.contents = cached_reference.contents(
            run_config, self.source, pairs_per_shard=pairs_per_shard
        )
        self.folder = cached_reference.folder_of(run_config)
        self.writer = ReferenceWriter(self.folder, self.contents)
        identity = blocks.digest(dataclasses.asdict(self.contents))
        self.blocks = [
            Block.of(place, [identity, shard.name], shard.stop - shard.start, shard)
            for place, shard in enumerate(self.contents.shards)
        ]

    def file(self, block: Block) -> Path:
        return self.folder / block.work.name

    def is_done(self, block: Block) -> bool:
        return False  # its file alone says so

    def is_kept(self, block: Block) -> bool:
        return self.writer.is_whole(block.work.name)

    def write(self, block: Block, made: Sequence[blocks.Row | blocks.Failed]) -> None:
        assert not made  # it is written

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert not rows  # the files are the result

    def open(self, device: str | None, upcoming: Sequence[Block]) -> blocks.Do:
        model = self._run.model.load(
            device=choose_device(device or "auto"),
            compute_dtype=DTYPES[self._run.training.precision],
            reference="none",
            trainable=False,
        )
        model.network.eval()  # the policy that training begins with is the reference

        def do(block: Block) -> list[blocks.Row | blocks.Failed]:
            shard: Shard = block.work
            pairs = range(shard.start, shard.stop)
            batches = self._samples.sweep([(number, shard.visit) for number in pairs])
            ids, values = _values(self._run.likelihood, model, batches, self.contents, shard)
            self.writer.write(shard, ids, values)
            return []

        return do


def _compute(
    run_config: RunConfig,
    session: sessions.Session,
    sharing: Sharing,
    console: Console,
    pairs_per_shard: int,
) -> ReferenceWriter | None:
    """Fill the folder of the reference; None where other shards still have to."""
    make = blocks.Recipe(ReferencePlan, run_config, {"pairs_per_shard": pairs_per_shard})
    plan = session.begin(make)
    contents, source = plan.contents, plan.source
    for line in [f"reference of {run_config.model.describe()}", *source.describe()]:
        console.print(line, markup=False, soft_wrap=True)
    needed = contents.bytes_of([block.work for block in session.pending])
    console.print(
        f"{', '.join(contents.views)}; {contents.visits} visits: "
        f"{in_bytes(contents.bytes_of(contents.shards))} in {len(contents.shards)} files, "
        f"{in_bytes(needed)} in {len(session.pending)} files to compute",
        soft_wrap=True,
    )
    check_room(plan.folder, needed, less="a smaller data.visits, or data.limit")
    with told_of_lost_workers(run_config.section.reader):
        if not do_blocks(session, plan, make, sharing, console):
            return None
    for line in source.describe_end():
        console.print(line, markup=False, soft_wrap=True)
    return plan.writer


def _rank(
    run_config: RunConfig,
    scores: Path,
    session: sessions.Session,
    sharing: Sharing,
    console: Console,
) -> bool:
    """Write the file of numbers of pairs; False where other shards still have to compute theirs."""
    make = blocks.Recipe(PairNumbersPlan, run_config, {"path": scores})
    with told_of_lost_workers(run_config.section.reader):
        plan = session.begin(make)
        if not do_blocks(session, plan, make, sharing, console):
            return False
    names = ", ".join(PAIR_NUMBERS)
    console.print(
        f"numbers of pairs ({names}), in {scores}: responses.ranking of a run reads them as "
        f"{{file: {scores}, by: ches_normalised, keep: 0.5}}",
        markup=False,
        soft_wrap=True,
    )
    return True


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
