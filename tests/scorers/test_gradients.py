"""Scores through which a gradient reaches the images: the same scores, and the right gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign import components
from diffalign.imaging.image_files import to_images
from diffalign.scorers.aesthetic import Aesthetic
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.clip import CLIPScore
from diffalign.scorers.hpsv2 import HPSv2
from diffalign.scorers.imagereward import ImageReward
from diffalign.scorers.jpeg import JPEG
from diffalign.scorers.pickscore import PickScore
from diffalign.scorers.pixels import levels_of, resized, rounded_levels, square, square_levels
from tests.tiny_clip import write_clip
from tests.tiny_rewards import (
    HPS,
    spread,
    two_images,
    write_aesthetic,
    write_hpsv2,
    write_imagereward,
)

PROMPTS = ["a red circle", "a blue square", "a red circle"]


def write_clip_score(folder: Path, **preprocessing) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", **preprocessing}
    content = {"model_cfg": HPS, "preprocess_cfg": {"resize_mode": "shortest", **settings}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = spread(open_clip.CLIP(**HPS))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def open_hpsv2(folder: Path, **settings) -> HPSv2:
    write_hpsv2(folder)
    return HPSv2(path=str(folder), **settings)


def open_imagereward(folder: Path, **settings) -> ImageReward:
    write_imagereward(folder)
    return ImageReward(path=str(folder), tokenizer=str(folder), **settings)


def open_aesthetic(folder: Path, **settings) -> Aesthetic:
    write_aesthetic(folder, "linear")
    path, clip = str(folder / "head.safetensors"), str(folder / "clip")
    return Aesthetic(path=path, clip=clip, **settings)


OPENED: dict[str, Callable[..., AbstractScorer]] = {
    "clip": lambda folder, **settings: CLIPScore(path=str(write_clip_score(folder)), **settings),
    "pickscore": lambda folder, **settings: PickScore(path=str(write_clip(folder)), **settings),
    "hpsv2": open_hpsv2,
    "imagereward": open_imagereward,
    "aesthetic": open_aesthetic,
}


@pytest.fixture(scope="module", params=OPENED)
def scorer(request, tmp_path_factory) -> AbstractScorer:
    return OPENED[request.param](tmp_path_factory.mktemp(request.param))


def batch(number: int) -> Tensor:
    image = two_images()[number]
    return torch.stack([image, -image, image.flip(-1)])


@pytest.mark.parametrize("number", [0, 1])
def test_scores_with_a_gradient_are_the_scores(scorer, number):
    images = batch(number)
    found = scorer.score_with_gradient(images, PROMPTS)
    assert found.dtype == torch.float32
    expected = scorer.score(images, PROMPTS)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert expected.std() > 1e-3


def test_a_step_along_the_gradient_does_what_the_gradient_says(scorer):
    # Of the tower's own size, and in whole levels, so that no rounding is in the way.
    images = rounded_levels(0.6 * torch.stack([i[:, :32, :32] for i in two_images()])) / 127.5 - 1
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score_with_gradient(images, PROMPTS[:2]).sum(), images)
    steepest = gradient.flatten(1).abs().topk(4, dim=1)
    steps = torch.zeros_like(images).flatten(1).scatter(1, steepest.indices, 1 / 127.5)
    direction = steps.view_as(images) * gradient.sign()
    with torch.no_grad():
        up, down = (scorer.score(images + sign * direction, PROMPTS[:2]) for sign in (1, -1))
    promised = 2 * steepest.values.sum(dim=1) / 127.5
    assert promised.min() > 1e-4
    assert (up - down).tolist() == pytest.approx(promised.tolist(), rel=0.05)


def test_the_gradient_of_resizing_is_that_of_the_smooth_operation():
    levels = rounded_levels(0.6 * two_images()[0][None]).requires_grad_()
    weight = torch.randn((1, 3, 47, 32), generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((resized(levels, (47, 32)) * weight).sum(), levels)
    settings = {"mode": "bicubic", "align_corners": False, "antialias": True}
    across = interpolate(levels, size=(90, 32), **settings)
    smooth = interpolate(across, size=(47, 32), **settings)
    (expected,) = torch.autograd.grad((smooth * weight).sum(), levels)
    assert torch.allclose(found, expected, atol=1e-6)


def test_weights_that_inference_mode_loaded_pass_a_gradient_later(tmp_path):
    for name, opened in OPENED.items():
        scorer = opened(tmp_path / name)
        with torch.inference_mode():
            scorer.score(batch(0), PROMPTS)
        images = (0.6 * batch(0)).requires_grad_()
        scorer.score_with_gradient(images, PROMPTS).sum().backward()
        assert images.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_moves_scores_a_little_and_says_so(tmp_path, name, dtype):
    whole = OPENED[name](tmp_path)
    half = OPENED[name](tmp_path, dtype=dtype)
    expected, found = whole.score(batch(0), PROMPTS), half.score(batch(0), PROMPTS)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    size = expected.abs().max().clamp(min=1)
    assert torch.allclose(found, expected, atol=0.1 * size.item(), rtol=0)
    assert half.fingerprint == f"{whole.fingerprint}-{dtype}"


def test_a_broken_image_has_no_score_and_spoils_no_other(scorer):
    images = batch(0)
    expected = scorer.score(images, PROMPTS)
    images[1, 0, 0, 0] = torch.inf
    found = scorer.score_with_gradient(images, PROMPTS)
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == pytest.approx(expected[[0, 2]].tolist(), abs=1e-3)


def test_counts_and_timesteps_are_refused_and_nothing_has_no_scores(scorer):
    with pytest.raises(ValueError, match="3 images do not match 1 prompts"):
        scorer.score_with_gradient(batch(0), ["a"])
    with pytest.raises(ValueError, match="leave out t"):
        scorer.score_with_gradient(batch(0), PROMPTS, torch.zeros(3))
    assert scorer.score_with_gradient(batch(0)[:0], []).shape == (0,)


@pytest.mark.parametrize(("filter", "apart"), [("bicubic", 1e-3), ("bilinear", 0.2)])
def test_squashed_images_of_clip_pass_a_gradient(tmp_path, filter, apart):
    settings = {"resize_mode": "squash", "interpolation": filter}
    squash = CLIPScore(path=str(write_clip_score(tmp_path, **settings)))
    found = squash.score_with_gradient(batch(0), PROMPTS)
    assert found.tolist() == pytest.approx(squash.score(batch(0), PROMPTS).tolist(), abs=apart)


def test_padded_images_of_clip_are_refused(tmp_path):
    longest = CLIPScore(path=str(write_clip_score(tmp_path, resize_mode="longest")))
    with pytest.raises(ValueError, match=r"by resize_mode longest, through which no gradient"):
        longest.score_with_gradient(batch(0), PROMPTS)


def test_a_scorer_without_gradient_says_so():
    assert not JPEG().differentiable
    with pytest.raises(ValueError, match=r"JPEG passes no gradient.*use one of clip, pickscore"):
        JPEG().score_with_gradient(batch(0), PROMPTS)


def test_what_is_declared_is_what_is_there():
    for kind in components.kinds(AbstractScorer):
        cls = components.find(AbstractScorer, kind)
        own = cls.score_with_gradient is not AbstractScorer.score_with_gradient
        assert cls.differentiable == own, kind


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(47, 32), (200, 150), (90, 40), (32, 61), (32, 40)])
def test_images_are_resized_as_by_pil(filter, size):
    image = two_images()[0][None]
    method = Image.Resampling.BICUBIC if filter == "bicubic" else Image.Resampling.BILINEAR
    expected = levels_of(to_images(image)[0].resize((size[1], size[0]), method))
    apart = (resized(rounded_levels(image), size, filter=filter)[0] - expected).abs()
    assert apart.max() <= 2 and (apart > 0).float().mean() < 0.03


@pytest.mark.parametrize("shape", [(32, 32), (90, 61), (47, 120), (33, 32), (35, 70)])
def test_squares_are_cut_as_by_torchvision(shape):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 3, *shape), generator=generator) * 2 - 1
    expected = levels_of(square(to_images(image)[0], 32))
    apart = (square_levels(rounded_levels(image), 32)[0] - expected).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


def test_rounding_passes_a_gradient_within_the_range_alone():
    images = torch.tensor([-1.5, -0.3, 0.2, 1.5]).view(1, 1, 2, 2).requires_grad_()
    levels = rounded_levels(images)
    assert levels.flatten().tolist() == [0.0, 89.0, 153.0, 255.0]
    levels.sum().backward()
    assert images.grad.flatten().tolist() == [0.0, 127.5, 127.5, 0.0]


@dataclass(frozen=True, kw_only=True)
class Plain(AbstractScorer):
    @property
    def fingerprint(self) -> str:
        return "plain"

    def score(self, images, prompts, t=None):
        return images.mean(dim=(1, 2, 3))


def test_a_scorer_of_ones_own_has_none_by_default():
    with pytest.raises(ValueError, match="the scorer Plain passes no gradient"):
        Plain().score_with_gradient(batch(0), PROMPTS)
