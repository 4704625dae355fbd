from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation.diversity import diversity, mean_pairwise_distance
from diffalign.evaluation.manifest import ManifestRow


def test_distance_worked_by_hand():
    images = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # root mean squares of the differences: 1, sqrt(2), 1
    assert mean_pairwise_distance(images) == pytest.approx((1 + np.sqrt(2) + 1) / 3)


def test_equal_pictures_have_no_distance_and_opposite_ones_the_largest():
    assert mean_pairwise_distance(np.ones((3, 4))) == 0
    assert mean_pairwise_distance(np.array([[1.0, 1.0], [-1.0, -1.0]])) == 2


def test_one_picture_has_no_distance():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        mean_pairwise_distance(np.ones((1, 4)))


def test_pictures_are_compared_within_a_prompt_and_a_model(tmp_path):
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
    assert diversity(tmp_path, rows) == {"a": pytest.approx(1.0), "b": 0.0}
