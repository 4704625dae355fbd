"""Writers of small valid data sets, one for each layout that diffalign reads."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Pair:
    """What is written for one pair: the chosen and the rejected file, and the caption."""

    chosen: bytes
    rejected: bytes
    caption: str


def solid_image(colour: tuple[int, int, int], *, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A gradient from black on the left to a colour on the right; size is (width, height)."""
    ramp = np.linspace(0.0, 1.0, size[0])[None, :, None]
    pixels = np.broadcast_to(ramp * np.array(colour), (size[1], size[0], 3))
    return Image.fromarray(pixels.round().astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_pairs(count: int, *, size: tuple[int, int] = (32, 32)) -> list[Pair]:
    """Pairs that differ: pair i prefers red of brightness 200 - i over blue of the same."""
    return [
        Pair(
            chosen=encoded(solid_image((200 - i % 150, 0, 0), size=size)),
            rejected=encoded(solid_image((0, 0, 200 - i % 150), size=size)),
            caption=f"a red thing, number {i}",
        )
        for i in range(count)
    ]


def pickapic_rows(pairs: Sequence[Pair]) -> list[dict]:
    """Rows with Pick-a-Pic's columns; in odd rows the chosen image is the second one."""
    rows = []
    for i, pair in enumerate(pairs):
        second = i % 2 == 1
        rows.append(
            {
                "are_different": True,
                "best_image_uid": f"uid-{i}-{int(second)}",
                "caption": pair.caption,
                "has_label": True,
                "image_0_uid": f"uid-{i}-0",
                "image_1_uid": f"uid-{i}-1",
                "jpg_0": pair.rejected if second else pair.chosen,
                "jpg_1": pair.chosen if second else pair.rejected,
                "label_0": float(not second),
                "label_1": float(second),
                "model_0": "a",
                "model_1": "b",
                "ranking_id": 1000 + i,
                "user_id": 7,
                "num_example_per_prompt": 1,
            }
        )
    return rows


def write_rows(file: Path, rows: Sequence[dict], *, row_group_size: int | None = None) -> Path:
    """Any rows as one parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    return file


def write_pickapic(folder: Path, pairs: Sequence[Pair], *, files: int = 1) -> Path:
    """Pick-a-Pic v2 parquet: `data/train-00000-of-00001.parquet` and so on."""
    rows = pickapic_rows(pairs)
    for number in range(files):
        name = f"train-{number:05d}-of-{files:05d}.parquet"
        start, stop = (len(rows) * i // files for i in (number, number + 1))
        write_rows(folder / "data" / name, rows[start:stop], row_group_size=4)
    return folder


def write_parquet(folder: Path, pairs: Sequence[Pair]) -> Path:
    """Parquet with `prompt`, `image1`, `image2` ({bytes, path}) and votes for each."""
    rows = []
    for i, pair in enumerate(pairs):
        images = [pair.chosen, pair.rejected] if i % 2 == 0 else [pair.rejected, pair.chosen]
        rows.append(
            {
                "prompt": pair.caption,
                "image1": {"bytes": images[0], "path": None},
                "image2": {"bytes": images[1], "path": None},
                "votes_image1": 3 if i % 2 == 0 else 1,
                "votes_image2": 1 if i % 2 == 0 else 3,
            }
        )
    write_rows(folder / "pairs.parquet", rows)
    return folder


def write_webdataset(folder: Path, pairs: Sequence[Pair], *, shards: int = 1) -> Path:
    """Tar shards whose members are named like Pick-a-Pic's columns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = pickapic_rows(pairs)
    for shard in range(shards):
        start, stop = (len(rows) * i // shards for i in (shard, shard + 1))
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(start, stop):
                members = {
                    "jpg_0.jpg": rows[i]["jpg_0"],
                    "jpg_1.jpg": rows[i]["jpg_1"],
                    "label_0.txt": str(rows[i]["label_0"]).encode(),
                    "label_1.txt": str(rows[i]["label_1"]).encode(),
                    "caption.txt": rows[i]["caption"].encode(),
                }
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def write_folder(folder: Path, pairs: Sequence[Pair]) -> Path:
    """`win/0000.png`, `lose/0000.png` and the caption in `win/0000.txt`."""
    for side in ("win", "lose"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for i, pair in enumerate(pairs):
        (folder / "win" / f"{i:04d}.png").write_bytes(pair.chosen)
        (folder / "lose" / f"{i:04d}.png").write_bytes(pair.rejected)
        (folder / "win" / f"{i:04d}.txt").write_text(pair.caption)
    return folder


def write_jsonl(folder: Path, pairs: Sequence[Pair]) -> Path:
    """`pairs.jsonl` with paths of images next to it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, pair in enumerate(pairs):
        (folder / "images" / f"{i}-a.png").write_bytes(pair.chosen)
        (folder / "images" / f"{i}-b.png").write_bytes(pair.rejected)
        row = {
            "prompt": pair.caption,
            "chosen": f"images/{i}-a.png",
            "rejected": f"images/{i}-b.png",
        }
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


WRITERS = {
    "pickapic": write_pickapic,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "folder": write_folder,
    "jsonl": write_jsonl,
}
"""`kind` -> writer(folder, pairs)."""


def write_winning_rows(folder: Path, pairs: Sequence[Pair]) -> Path:
    """Parquet with `text` and `image`, as sets for fine-tuning have them."""
    rows = [{"text": pair.caption, "image": {"bytes": pair.chosen}} for pair in pairs]
    write_rows(folder / "images.parquet", rows)
    return folder


def write_winning_shard(folder: Path, pairs: Sequence[Pair]) -> Path:
    """A tar shard of `000000.png` and `000000.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for i, pair in enumerate(pairs):
            for suffix, content in (("png", pair.chosen), ("txt", pair.caption.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def write_winning_folder(folder: Path, pairs: Sequence[Pair]) -> Path:
    """`win/0000.png` next to `win/0000.txt`, and no other folder."""
    write_folder(folder, pairs)
    shutil.rmtree(folder / "lose")
    return folder


def write_winning_lines(folder: Path, pairs: Sequence[Pair]) -> Path:
    """`pairs.jsonl` with `prompt` and `chosen`."""
    file = write_jsonl(folder, pairs) / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        del row["rejected"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WINNER_WRITERS = {
    "parquet": write_winning_rows,
    "webdataset": write_winning_shard,
    "folder": write_winning_folder,
    "jsonl": write_winning_lines,
}
"""`kind` -> writer(folder, pairs) of the chosen sides alone."""
