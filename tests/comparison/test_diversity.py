from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.comparison.diversity import (
    diversity,
    feature_distance,
    feature_figures,
    mean_pairwise_angle,
    mean_pairwise_distance,
    pixel_distance,
    vendi_score,
)
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.generation.manifest import ManifestRow
from diffalign.jobs import score
from diffalign.scorers.jpeg import JPEG
from diffalign.scorers.pickscore import PickScore

PLAYGROUND = Path(__file__).parents[2] / "assets/playground"


def test_distance_worked_by_hand():
    images = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # root mean squares of the differences: 1, sqrt(2), 1
    assert mean_pairwise_distance(images) == pytest.approx((1 + np.sqrt(2) + 1) / 3)


def test_equal_images_have_no_distance_and_opposite_ones_the_largest():
    assert mean_pairwise_distance(np.ones((3, 4))) == 0
    assert mean_pairwise_distance(np.array([[1.0, 1.0], [-1.0, -1.0]])) == 2


def test_one_image_has_no_distance():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        mean_pairwise_distance(np.ones((1, 4)))


def test_images_are_compared_within_a_prompt_and_a_model(tmp_path):
    rows = []
    levels = {("a", "x"): (0, 255), ("a", "y"): (0, 0), ("b", "x"): (255, 255), ("b", "y"): (0,)}
    for (model, prompt), values in levels.items():
        for seed, value in enumerate(values):
            file = f"{model}-{prompt}-{seed}.png"
            Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / file)
            rows.append(
                ManifestRow(
                    model=model,
                    prompt=prompt,
                    prompt_id=prompt,
                    seed=seed,
                    file=file,
                    sha256="",
                    fingerprint="",
                    sampler={},
                )
            )
    found = diversity(tmp_path, rows, pixel_distance)
    assert found == {"a": pytest.approx(1.0), "b": 0.0}


def test_angles_worked_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert mean_pairwise_angle(features) == pytest.approx((1 + 2 + 1) / 3)
    assert mean_pairwise_angle(torch.ones(3, 4)) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least two images, got 1"):
        mean_pairwise_angle(torch.ones(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        mean_pairwise_angle(torch.full((2, 4), torch.nan))


def test_a_shifted_copy_is_far_nearer_than_another_image_by_features_and_not_by_pixels():
    data = open_data(PairConfig(path=str(PLAYGROUND / "preferences"), resolution=64))
    images = [
        Image.open(io.BytesIO(pair.chosen)).convert("RGB")  # type: ignore[arg-type]
        for pair in islice(data.pairs(), 8)
    ]
    shifted = [Image.fromarray(np.roll(np.asarray(image), 8, axis=1)) for image in images]
    by_features = feature_distance(PickScore(path=str(PLAYGROUND / "clip")).features)

    def share(distance) -> float:
        """Distance of an image and its copy, in units of that of two images."""
        copies = [distance(pair) for pair in zip(images, shifted, strict=True)]
        return float(np.mean(copies)) / distance(images)

    assert share(by_features) < 0.15
    assert share(pixel_distance) > 0.8, "which is why it is not called diversity"


def test_the_score_job_says_how_diverse_images_are(tmp_path, capsys):
    from tests.jobs.folders import fill

    levels = {("base", "a cat", 0): 0, ("base", "a cat", 1): 255, ("base", "a dog", 0): 9}
    fill(tmp_path, levels)
    scorer = PickScore(path=str(PLAYGROUND / "clip"))
    score.run(score.ScoreConfig(images=tmp_path, scorer=scorer, diversity=True, device="cpu"))
    found = json.loads((tmp_path / "scores/pickscore.diversity.json").read_text())
    assert 0 < found["mean_cosine_distance"]["base"] < 2
    assert 1 < found["vendi_score"]["base"] < 2
    said = " ".join(capsys.readouterr().out.split())
    assert "vendi score" in said and "bought its wins with sameness" in said


def with_cosines(kernel) -> np.ndarray:
    """Features of length 1 whose cosines are these."""
    values, vectors = np.linalg.eigh(np.array(kernel))
    return vectors * np.sqrt(np.maximum(values, 0))


@pytest.mark.parametrize(
    ("kernel", "score"),
    [  # the first by the package vendi-score
        (
            [[1, 0.9, 0.2, 0.1], [0.9, 1, 0.3, 0.2], [0.2, 0.3, 1, 0.5], [0.1, 0.2, 0.5, 1]],
            2.835468394536,
        ),
        (np.eye(4), 4.0),
        (np.ones((4, 4)), 1.0),
        (np.kron(np.eye(2), np.ones((2, 2))), 2.0),  # two pairs of twins
    ],
)
def test_the_vendi_score_counts_different_images(kernel, score):
    assert vendi_score(3 * with_cosines(kernel)) == pytest.approx(score, abs=1e-9)


def test_twins_and_half_alike_images_differ_by_vendi_and_not_by_distance():
    twins = with_cosines(np.kron(np.eye(2), np.ones((2, 2))))
    half = with_cosines(np.full((4, 4), 1 / 3) + 2 / 3 * np.eye(4))
    by_distance = [mean_pairwise_angle(torch.from_numpy(f)) for f in (twins, half)]
    assert by_distance[0] == pytest.approx(by_distance[1])
    assert vendi_score(half) > 1.3 * vendi_score(twins)


def test_figures_are_means_over_prompts_and_distances_pair_the_noise():
    right, up = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    features = {
        ("base", "a", 0): right,
        ("base", "a", 1): up,
        ("tuned", "a", 0): right,
        ("tuned", "a", 1): right,
        ("tuned", "b", 0): up,
        ("tuned", "b", 1): right,
    }
    assert feature_figures(features, "base") == {
        "mean_cosine_distance": {"base": 1.0, "tuned": 0.5},
        "vendi_score": {"base": pytest.approx(2.0), "tuned": pytest.approx(1.5)},
        "distance_from_base": {"tuned": 0.5},
    }


def test_diversity_by_a_scorer_without_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match="jpeg has none: use pickscore, clip"):
        score.ScoreConfig(images=tmp_path, scorer=JPEG(), diversity=True)
