"""How a data set of a million rows starts, resumes and sits in memory, streamed and at random.

    python scripts/bench_rows.py                 # 1,000,000 rows, some 2.5 GB and as much again
    python scripts/bench_rows.py --tiny          # the same with some hundred rows

Writes parquet files of pairs of small JPEGs (few images, many rows) to a temporary folder; nothing
is left behind but what `--out` names. Every figure is measured in a process of its own, without the
time that Python takes to import. Of a stream of so many ranks it also counts what each reads.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image

from diffalign import world
from diffalign.data.layout import Layout
from diffalign.data.location import locate
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.source import PairSource
from diffalign.data.tables import load_table
from diffalign.files import write_json
from diffalign.timesteps import TimestepSampling

PAIRS_AT_ONCE = 16
RANKS = 4
"""Of a run whose ranks are opened one after another, to see what each of them reads."""


def write_rows(folder: Path, rows: int, *, files: int, group: int, pixels: int) -> None:
    """Write parquet files, the bytes of every image written out where it is met."""
    generator = np.random.default_rng(0)
    images = pa.array([_jpeg(pixels, generator) for _ in range(64)], pa.binary())
    per_file = rows // files
    for file in range(files):
        numbers = np.arange(file * per_file, (file + 1) * per_file)
        table = pa.table(
            {
                "caption": pa.array([f"image number {number}" for number in numbers]),
                "jpg_0": images.take(pa.array(numbers % 64)),
                "jpg_1": images.take(pa.array((numbers + 1) % 64)),
                "label_0": pa.array((numbers % 2).astype(float)),
                "label_1": pa.array(1.0 - numbers % 2),
            }
        )
        name = folder / f"train-{file:05d}-of-{files:05d}.parquet"
        pq.write_table(table, name, row_group_size=group, use_dictionary=False, compression="NONE")


def _jpeg(pixels: int, generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    noise = generator.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def open_source(folder: Path, *, streaming: bool, ranks: int = 1) -> PairSource:
    """That of a run of 64 pairs a step, on this rank."""
    start = Layout(samples_per_device=PAIRS_AT_ONCE, micro_batch=4 * PAIRS_AT_ONCE, micro_batches=1)
    return PairSource.open(
        PairConfig(path=str(folder), resolution=16, workers=0, streaming=streaming),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        layout=start.on_these_processes(PAIRS_AT_ONCE),
        timesteps=TimestepSampling(),
        schedule_length=1000,
        skipped=None,
    )


def resident() -> int:
    """Bytes of this process that are in memory and its own: mapped files are the system's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def started(folder: Path, streaming: bool) -> dict[str, float]:
    """Seconds from nothing to the first batch."""
    began = time.perf_counter()
    source = open_source(folder, streaming=streaming)
    opened = time.perf_counter()
    next(iter(source))
    return {"opened_s": opened - began, "first_batch_s": time.perf_counter() - began}


def converted(folder: Path) -> dict[str, float]:
    """Seconds that the datasets library takes for its Arrow cache, once."""
    began = time.perf_counter()
    config = PairConfig(path=str(folder), resolution=16)
    load_table(locate(config), config)
    return {"converted_s": time.perf_counter() - began}


def walked(folder: Path, streaming: bool, rows: int, file: Path) -> dict[str, float]:
    """Memory over so many rows, and the position behind them, which is written to `file`."""
    source = open_source(folder, streaming=streaming)
    batches = iter(source)
    warm_up = rows // PAIRS_AT_ONCE // 10
    for _ in islice(batches, warm_up):
        pass
    first = peak = resident()
    began = time.perf_counter()
    for _ in islice(batches, rows // PAIRS_AT_ONCE):
        peak = max(peak, resident())
    seconds = time.perf_counter() - began
    write_json(file, source.state_dict())
    return {
        "grew_mb": (peak - first) / 1e6,
        "resident_mb": first / 1e6,
        "rows_per_s": rows / seconds,
    }


def resumed(folder: Path, streaming: bool, file: Path) -> dict[str, float]:
    """Seconds from nothing to the first batch behind a position, and what is read for it."""
    began, read = time.perf_counter(), _read_bytes()
    source = open_source(folder, streaming=streaming)
    source.load_state_dict(json.loads(file.read_text()))
    next(iter(source))
    seconds = time.perf_counter() - began
    return {"resumed_s": seconds, "resumed_read_mb": (_read_bytes() - read) / 1e6}


def shared(folder: Path, rank: int, batches: int) -> dict[str, float]:
    """Bytes that one of four ranks reads of a stream."""
    world.rank, world.size = (lambda: rank), (lambda: RANKS)
    source = open_source(folder, streaming=True)
    read = _read_bytes()
    for _ in islice(iter(source), batches):
        pass
    return {f"rank_{rank}_read_mb": (_read_bytes() - read) / 1e6}


def _read_bytes() -> int:
    """Bytes that this process asked files for, without those that it looks at in mapped ones."""
    counters: Any = psutil.Process().io_counters()
    return int(getattr(counters, "read_chars", counters.read_bytes))


def alone(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The figures of a process that does nothing else."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(measure, arguments)


def figures(folder: Path, rows: int, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """What is measured, and the figures."""
    yield "streamed: start", alone(started, folder, True)
    yield "at random: conversion, once", alone(converted, folder)
    yield "at random: start", alone(started, folder, False)
    for streaming, how in ((True, "streamed"), (False, "at random")):
        place = work / f"{how}.json"
        yield f"{how}: {rows:,} rows", alone(walked, folder, streaming, rows, place)
        yield f"{how}: resumed", alone(resumed, folder, streaming, place)
    share: dict[str, float] = {}
    for rank in range(RANKS):
        share |= alone(shared, folder, rank, rows // PAIRS_AT_ONCE // RANKS)
    yield f"streamed: {RANKS} ranks, {rows:,} rows", share


def main(
    rows: Annotated[int, typer.Option(help="rows of the data set")] = 1_000_000,
    walk: Annotated[int, typer.Option(help="rows over which memory is watched")] = 100_000,
    files: Annotated[int, typer.Option(help="parquet files")] = 64,
    group: Annotated[int, typer.Option(help="rows of a row group")] = 1000,
    tiny: Annotated[bool, typer.Option(help="a few hundred rows")] = False,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
) -> None:
    """Print a table of the figures."""
    if tiny:
        rows, walk, files, group = 512, 256, 4, 32
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, work = Path(temporary) / "rows", Path(temporary)
        folder.mkdir()
        os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
        datasets.config.HF_DATASETS_CACHE = work / "cache"
        write_rows(folder, rows, files=files, group=group, pixels=32)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{rows:,} rows in {files} files of {size / 1e9:.2f} GB, {group:,} rows a row group")
        for what, values in figures(folder, walk, work):
            found[what] = values
            print(f"  {what}: " + ", ".join(f"{key} {n:,.2f}" for key, n in values.items()))
    if out is not None:
        write_json(out, {"rows": rows, "files": files, "bytes": size, "figures": found})


if __name__ == "__main__":
    typer.run(main)
