"""How many pairs a second the loader decodes, crops and collates on this machine.

    python scripts/bench_data.py --pixels 512 --workers 0 --workers 1 --workers 2

Writes some Pick-a-Pic-like JPEG pairs to a temporary folder first; nothing is left behind.
"""

from __future__ import annotations

import io
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image, ImageFilter

from diffalign.data.layout import Layout
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.source import PairSource
from diffalign.timesteps import TimestepSampling

BATCH_PAIRS = 8


def jpeg(pixels: int, generator: np.random.Generator) -> bytes:
    """A blurred random image, which compresses about as well as a photograph."""
    noise = generator.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pairs(file: Path, pairs: int, pixels: int) -> int:
    """Write a table of pairs; returns the mean size of a JPEG in bytes."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "caption": f"image {i}",
            "jpg_0": jpeg(pixels, generator),
            "jpg_1": jpeg(pixels, generator),
            "label_0": 1.0,
            "label_1": 0.0,
        }
        for i in range(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return sum(len(row["jpg_0"]) for row in rows) // pairs


def measure(config: PairConfig, batches: int) -> tuple[float, float]:
    """Pairs per second once the workers run, and CPU milliseconds a pair of this process alone."""
    source = PairSource.open(
        config,
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        layout=Layout.start(samples_per_device=BATCH_PAIRS, accumulation=1),
        timesteps=TimestepSampling(),
        schedule_length=1000,
        skipped=None,
    )
    stream = iter(source)
    warm_up = 2 * max(1, config.workers) + 1  # what the workers hold ready
    for _ in islice(stream, warm_up):
        pass
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in islice(stream, batches):
        pass
    count = batches * BATCH_PAIRS
    return count / (time.perf_counter() - wall), 1000 * (time.process_time() - cpu) / count


def main(
    pixels: Annotated[int, typer.Option(help="side of the written JPEGs")] = 512,
    resolution: Annotated[int, typer.Option(help="side of the decoded images")] = 512,
    pairs: Annotated[int, typer.Option(help="pairs in the data set")] = 64,
    batches: Annotated[int, typer.Option(help=f"measured batches of {BATCH_PAIRS}")] = 24,
    workers: Annotated[list[int] | None, typer.Option(help="worker processes; repeatable")] = None,
) -> None:
    """Print pairs per second for each number of workers, read at random and streamed."""
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
        size = write_pairs(Path(folder) / "pairs.parquet", pairs, pixels)
        print(f"{pairs} pairs of {pixels} px JPEGs, {size / 1000:.0f} kB each, to {resolution} px")
        for streaming in (False, True):
            for count in workers or [0, 1, 2]:
                config = PairConfig(
                    path=folder, resolution=resolution, workers=count, streaming=streaming
                )
                rate, cpu = measure(config, batches)
                how = "streamed" if streaming else "random"
                print(
                    f"  {how:8}  workers {count}: {rate:6.1f} pairs/s, "
                    f"{cpu:4.1f} ms CPU a pair in the training process"
                )


if __name__ == "__main__":
    typer.run(main)
