"""How long `diffalign check` takes for a large set of image pairs.

    python scripts/bench_check.py                      # 100,000 rows of 256 px JPEGs, some 1.6 GB
    python scripts/bench_check.py --images all         # and with every image decoded
    python scripts/bench_check.py --tiny               # the same with some hundred rows

Writes parquet with Pick-a-Pic's columns to a temporary folder, every image a file of its own: few
images are encoded, and a comment in each file makes its bytes differ. Every thousandth row is
planted with a defect, so that the figures are those of a check that finds something; and with so
few different images the decoded ones have near-duplicates. What the search for these takes among as
many images that differ is timed by itself, on random hashes. The job runs in a process of its own,
imports included; nothing is left behind but what `--out` names.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from measuring import machine, on_this_machine
from PIL import Image

from diffalign.checking.rows import Look
from diffalign.checking.similarity import near_duplicates
from diffalign.files import read_json, write_json

ENCODED = 512
"""Different images."""
EVERY = 1000
"""Rows between planted defects."""


def write_rows(folder: Path, rows: int, *, group: int, pixels: int) -> None:
    """Files of 10,000 rows at most, in row groups."""
    images = [_jpeg(number, pixels) for number in range(ENCODED)]
    per_file = min(rows, 10_000)
    files = -(-rows // per_file)
    schema = pa.schema(
        [
            *[(name, pa.string()) for name in ("caption", "model_0", "model_1")],
            *[(name, pa.binary()) for name in ("jpg_0", "jpg_1")],
            *[(name, pa.float64()) for name in ("label_0", "label_1")],
        ]
    )
    for file in range(files):
        name = folder / f"train-{file:05d}-of-{files:05d}.parquet"
        with pq.ParquetWriter(name, schema, compression="NONE", use_dictionary=False) as writer:
            for start in range(file * per_file, min(rows, (file + 1) * per_file), group):
                numbers = range(start, min(start + group, rows, (file + 1) * per_file))
                table = pa.Table.from_pylist([_row(n, images) for n in numbers], schema=schema)
                writer.write_table(table, row_group_size=group)


def _row(number: int, images: list[bytes]) -> dict[str, object]:
    first = _own(images[number % ENCODED], 2 * number)
    second = _own(images[(number + 1) % ENCODED], 2 * number + 1)
    if number % EVERY == EVERY - 1:
        second = first
    if number % EVERY == EVERY - 2:
        second = second[: len(second) // 2]
    return {
        "caption": f"a photograph of thing number {number // 4}",
        "model_0": "sdxl",
        "model_1": "flux",
        "jpg_0": first,
        "jpg_1": second,
        "label_0": float(number % 2),
        "label_1": 1.0 - number % 2,
    }


def _own(jpeg: bytes, number: int) -> bytes:
    """The same image in a file of other bytes: with a comment behind its first marker."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def _jpeg(seed: int, pixels: int) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (pixels, pixels, 3))
    levels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def check(folder: Path, output: Path, images: str, workers: int) -> dict[str, float]:
    """Time the job, and watch the memory of its processes together.

    Returns:
        Wall and CPU seconds; CPU seconds of the busiest process, which a machine with a free core
        for each would take at least; and the peak of the memory that is the processes' own, in GB.
    """
    settings = [f"images={images}", f"workers={workers}", f"output={output}", "fail_on=never"]
    command = [sys.executable, "-m", "diffalign", "check", str(folder), *settings]
    start, before, peak, busiest = time.perf_counter(), os.times(), 0, 0.0
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched = psutil.Process(job.pid)
    while job.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(process.memory_full_info().uss for process in family))
            times = [process.cpu_times() for process in family]
            busiest = max([busiest, *(each.user + each.system for each in times)])
        except psutil.Error:  # one of them has just ended
            pass
        time.sleep(0.2)
    if job.returncode:
        raise SystemExit(f"the check ended with {job.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    wall = time.perf_counter() - start
    return {"wall": wall, "cpu": cpu, "busiest": busiest, "gb": peak / 1e9}


def search(images: int) -> float:
    """CPU seconds of the search for near-duplicates among so many images that differ."""
    generator = np.random.default_rng(0)
    looks = [
        Look(int.from_bytes(generator.bytes(8), "big"), generator.bytes(192)) for _ in range(images)
    ]
    before = time.process_time()
    near_duplicates(looks, bits=4, levels=6.0)
    return time.process_time() - before


def main(
    rows: Annotated[int, typer.Option(help="rows of the data set")] = 100_000,
    pixels: Annotated[int, typer.Option(help="side of an image")] = 256,
    group: Annotated[int, typer.Option(help="rows of a row group")] = 500,
    images: Annotated[str, typer.Option(help="all, sample or none, as of the check")] = "sample",
    workers: Annotated[int, typer.Option(help="processes that read")] = 2,
    tiny: Annotated[bool, typer.Option(help="a few hundred rows")] = False,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
) -> None:
    """Print the time and what was found."""
    if tiny:
        rows, pixels, group = 2000, 32, 100
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "rows", Path(temporary) / "check"
        folder.mkdir()
        write_rows(folder, rows, group=group, pixels=pixels)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{rows:,} rows of {pixels} px JPEGs, {size / 1e9:.2f} GB; images: {images}")
        found = check(folder, output, images, workers)
        report = read_json(output / "check.json")
    counts = {finding["name"]: finding["count"] for finding in report["findings"]}
    print(
        f"  {found['wall']:.1f} s, {found['cpu']:.1f} s of CPU time, {found['busiest']:.1f} s of "
        f"the busiest process, {found['gb']:.2f} GB; "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )
    seconds = search(2 * rows)
    print(f"  search among {2 * rows:,} images that differ: {seconds:.1f} s of CPU time")
    print(f"  {on_this_machine(machine())}")
    if out is not None:
        write_json(
            out,
            {
                "rows": rows,
                "pixels": pixels,
                "bytes": size,
                **found,
                "search": seconds,
                "found": counts,
            },
        )


if __name__ == "__main__":
    typer.run(main)
