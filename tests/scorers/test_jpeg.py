from __future__ import annotations

import pytest
import torch

from diffalign.imaging.image_files import to_images
from diffalign.scorers.jpeg import JPEG


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """A flat image, a ramp, and noise."""
    flat = torch.full((3, 64, 64), 0.3)
    ramp = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    noise = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.stack([flat, ramp, noise])


PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize("quality", [95, 40])
def test_the_score_is_the_size_of_the_file_in_kilobytes(images, quality, tmp_path):
    scores = JPEG(goal="incompressible", quality=quality).score(images, PROMPTS)
    for image, score in zip(to_images(images), scores.tolist(), strict=True):
        image.save(tmp_path / "x.jpg", quality=quality)
        assert score == pytest.approx((tmp_path / "x.jpg").stat().st_size / 1000)


def test_plain_images_are_compressible_and_noise_is_not(images):
    compressible = JPEG().score(images, PROMPTS)
    assert (compressible < 0).all()
    assert compressible.argsort(descending=True).tolist() == [0, 1, 2]
    assert torch.equal(JPEG(goal="incompressible").score(images, PROMPTS), -compressible)


def test_the_quality_is_that_of_ddpo(images):
    assert torch.equal(JPEG().score(images, PROMPTS), JPEG(quality=95).score(images, PROMPTS))


def test_prompts_do_not_matter(images):
    assert torch.equal(JPEG().score(images, PROMPTS), JPEG().score(images, ["", "x", "y"]))


def test_every_setting_has_its_own_fingerprint():
    scorers = [JPEG(), JPEG(goal="incompressible"), JPEG(quality=40)]
    assert len({scorer.fingerprint for scorer in scorers}) == 3


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_that_no_encoder_knows_is_refused(quality):
    with pytest.raises(ValueError, match="quality must be between 1 and 100"):
        JPEG(quality=quality)
