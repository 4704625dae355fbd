"""How much the images of one prompt differ, and how far they are from those of another model:
preferences may buy fidelity with sameness.

Features of a scorer's image tower see an image and a copy of it that is shifted a little as alike;
`pixel_distance` compares pixel with pixel, and for it a shifted copy is nearly another image. The
mean distance of a prompt's images does not tell four images in two pairs of twins from four that
are all half alike; the Vendi score counts how many different ones there are.

Source: Friedman and Dieng 2023, The Vendi score, arXiv:2210.02410, definition 3.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import pdist
from torch import Tensor

from diffalign.files import read_json
from diffalign.generation.manifest import ItemKey, ManifestRow
from diffalign.imaging.image_files import read_image
from diffalign.parsing import checked

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


def vendi_score(features: NDArray[np.float64]) -> float:
    """How many different images there are: exp of the entropy of the eigenvalues of K / n, where K
    are the cosines of all images with each other.

    Args:
        features: shape [n, d], at least one row, none of length 0.

    Returns:
        From 1, all are alike, to n, each is at right angles to all others.
    """
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = scipy.linalg.eigvalsh(rows @ rows.T / len(rows))
    return float(np.exp(scipy.special.entr(np.clip(values, 0, 1)).sum()))


def image_features(
    folder: Path,
    rows: Iterable[ManifestRow],
    embed: Callable[[Sequence[Image.Image]], Tensor],
    on_images: Callable[[int], None] = lambda images: None,
    *,
    batch_size: int = 32,
) -> dict[ItemKey, NDArray[np.float64]]:
    """Features of every image, of length 1.

    Args:
        folder: of a manifest.
        rows: of it.
        embed: n RGB images -> features [n, d], such as `PickScore.features`.
        on_images: told the number of images that have just been looked at.
        batch_size: images opened at once.

    Raises:
        ValueError: features are not finite.
    """
    listed = list(rows)
    found: dict[ItemKey, NDArray[np.float64]] = {}
    for start in range(0, len(listed), batch_size):
        batch = listed[start : start + batch_size]
        with torch.no_grad():
            features = embed([read_image(folder / row.file) for row in batch]).double().cpu()
        if not features.isfinite().all():
            raise ValueError("features of an image are not finite")
        normalised = torch.nn.functional.normalize(features, dim=1).numpy()
        found |= {row.key: values for row, values in zip(batch, normalised, strict=True)}
        on_images(len(batch))
    return found


def feature_figures(
    features: Mapping[ItemKey, NDArray[np.float64]], baseline: str
) -> dict[str, dict[str, float]]:
    """Diversity of each model, and its distance from the baseline, by features of images.

    Args:
        features: of `image_features`.
        baseline: name of the model that the others are held against.

    Returns:
        Name of the figure -> model -> value. `mean_cosine_distance` and `vendi_score` are means
        over prompts that have two images of the model; the distance from the baseline is the mean
        of 1 - cosine over images of the same prompt and seed. Figures of no model are absent.
    """
    by_prompt: defaultdict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    moved: defaultdict[str, list[float]] = defaultdict(list)
    for (model, prompt, seed), values in features.items():
        by_prompt[model, prompt].append(values)
        other = features.get((baseline, prompt, seed))
        if model != baseline and other is not None:
            moved[model].append(1 - float(values @ other))
    distances: defaultdict[str, list[float]] = defaultdict(list)
    counts: defaultdict[str, list[float]] = defaultdict(list)
    for (model, _), group in by_prompt.items():
        if len(group) > 1:
            distances[model].append(mean_pairwise_angle(torch.from_numpy(np.stack(group))))
            counts[model].append(vendi_score(np.stack(group)))
    named = {
        "mean_cosine_distance": distances,
        "vendi_score": counts,
        f"distance_from_{baseline}": moved,
    }
    return {
        name: {model: float(np.mean(values)) for model, values in of.items()}
        for name, of in named.items()
        if of
    }


def diversity_file(column: Path) -> Path:
    """The file of such figures next to a column of scores."""
    return column.with_suffix(".diversity.json")


def read_diversity(column: Path) -> dict[str, dict[str, float]]:
    """Figures that lie next to a column of scores; empty where there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = diversity_file(column)
    if not path.is_file():
        return {}
    return checked(dict[str, dict[str, float]], read_json(path), path)


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
