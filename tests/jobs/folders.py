"""A generated folder without a model: grey images whose brightness is their score."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from diffalign.files import write_atomically
from diffalign.generation.manifest import ManifestRow, append_rows, file_digest


def fill(folder: Path, levels: Mapping[tuple[str, str, int], int]) -> Path:
    """Write images and their manifest.

    Args:
        folder: created.
        levels: grey level, 0 to 255, by (model, prompt, seed).
    """
    rows = []
    for (model, prompt, seed), level in levels.items():
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (level,) * 3).save(buffer, format="png")
        name = prompt.replace(" ", "-")
        file = f"images/{model}/{name}-{seed}.png"
        write_atomically(folder / file, buffer.getvalue())
        rows.append(
            ManifestRow(
                model=model,
                prompt=prompt,
                prompt_id=name,
                seed=seed,
                file=file,
                sha256=file_digest(buffer.getvalue()),
                fingerprint=f"weights-{model}",
                sampler={"steps": 4, "scheduler": None},
            )
        )
    append_rows(folder, rows)
    return folder
