"""Previews in TensorBoard, wandb and trackio."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def send_previews(
    trackers: Sequence[Any],
    captions: Sequence[str],
    made: Sequence[Image.Image | str],
    *,
    step: int,
) -> None:
    """Show previews wherever a run's figures go.

    Args:
        trackers: of accelerate; those of another kind than the three are passed over.
        captions: n prompts or questions.
        made: n images or texts.
        step: of the run.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            _to_tensorboard(tracker.tracker, captions, made, step)
        elif tracker.name in ("wandb", "trackio"):
            # Both have the same classes of images and tables.
            media = importlib.import_module(tracker.name)
            tracker.tracker.log(_as_media(media, captions, made, step), step=step)


def _to_tensorboard(
    writer: Any, captions: Sequence[str], made: Sequence[Image.Image | str], step: int
) -> None:
    for number, (caption, frame) in enumerate(zip(captions, made, strict=True)):
        name = f"previews/{number}"
        if isinstance(frame, str):
            writer.add_text(name, f"**{caption}**\n\n{frame}", global_step=step)
        else:
            pixels = np.asarray(frame.convert("RGB"))
            writer.add_image(name, pixels, global_step=step, dataformats="HWC")
            writer.add_text(f"{name}/prompt", caption, global_step=step)
    writer.flush()


def _as_media(
    media: Any, captions: Sequence[str], made: Sequence[Image.Image | str], step: int
) -> dict[str, Any]:
    images = {
        f"previews/{number}": media.Image(frame, caption=caption)
        for number, (caption, frame) in enumerate(zip(captions, made, strict=True))
        if not isinstance(frame, str)
    }
    texts = [
        [step, caption, frame]
        for caption, frame in zip(captions, made, strict=True)
        if isinstance(frame, str)
    ]
    if not texts:
        return images
    table = media.Table(columns=["step", "question", "response"], data=texts)
    return {**images, "previews/responses": table}
