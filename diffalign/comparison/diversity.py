"""How much the images of one prompt differ: preferences may buy fidelity with sameness.

Two measures. `feature_distance` compares what a scorer's image tower sees: an image and a copy of
it that is shifted a little are alike to it. `pixel_distance` compares pixel with pixel: for it a
shifted copy is nearly another image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import pdist
from torch import Tensor

from diffalign.generation.manifest import ManifestRow
from diffalign.imaging.image_files import read_image

Distance = Callable[[Sequence[Image.Image]], float]
"""How much at least two RGB images differ."""


def mean_pairwise_distance(images: NDArray[np.float32]) -> float:
    """Mean over all pairs of images of the root mean square difference of their pixels.

    Args:
        images: shape [n, ...] in [-1, 1], at least two.

    Returns:
        From 0, all are the same, to 2.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(images) < 2:
        raise ValueError(f"a distance needs at least two images, got {len(images)}")
    rows = images.reshape(len(images), -1).astype(np.float64)
    return float(pdist(rows).mean() / np.sqrt(rows.shape[1]))


def pixel_distance(images: Sequence[Image.Image]) -> float:
    """Mean root mean square difference of the pixels of all pairs of images, 0 to 2."""
    levels = [np.asarray(image, dtype=np.float32) for image in images]
    return mean_pairwise_distance(np.stack(levels) / 127.5 - 1)


def mean_pairwise_angle(features: Tensor) -> float:
    """Mean over all pairs of 1 - cosine of their features.

    Args:
        features: shape [n, d], at least two rows, of any length but 0.

    Returns:
        From 0, all point the same way, to at most 2 (two opposite rows).

    Raises:
        ValueError: there are fewer than two, or one is not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a distance needs at least two images, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError("features of an image are not finite")
    rows = features.double().cpu().numpy()
    return float(np.clip(pdist(rows, metric="cosine"), 0, 2).mean())


def feature_distance(embed: Callable[[Sequence[Image.Image]], Tensor]) -> Distance:
    """The distance between images by the features that a scorer has of them.

    Args:
        embed: n RGB images -> features [n, d], such as `PickScore.features`.
    """

    def distance(images: Sequence[Image.Image]) -> float:
        with torch.no_grad():
            return mean_pairwise_angle(embed(images))

    return distance


def diversity(
    folder: Path,
    rows: Iterable[ManifestRow],
    distance: Distance,
    on_prompt: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Of each model, the mean over prompts of the distance between a prompt's images.

    Args:
        folder: of a manifest.
        rows: of it; prompts with a single image of a model do not count.
        distance: between the images of a prompt.
        on_prompt: told the number of images that have just been compared.

    Returns:
        Model -> distance, for models that have a prompt with two images.
    """
    files: defaultdict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        files[row.model][row.prompt_id].append(folder / row.file)
    distances: defaultdict[str, list[float]] = defaultdict(list)
    for model, prompts in files.items():
        for paths in prompts.values():
            if len(paths) > 1:
                distances[model].append(distance([read_image(path) for path in paths]))
                on_prompt(len(paths))
    return {model: float(np.mean(values)) for model, values in distances.items()}
