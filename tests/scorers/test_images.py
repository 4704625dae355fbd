from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign import components
from diffalign.imaging.image_files import to_images
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.images import AbstractImageScorer, cosines


@dataclass(frozen=True, kw_only=True)
class TopLeft(AbstractImageScorer):
    """Level of the first pixel's red, as a whole number."""

    @property
    def fingerprint(self) -> str:
        return "top-left"

    def score_images(self, pil_images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        assert pil_images, "nothing to score"
        return torch.tensor([pil_image.getpixel((0, 0))[0] for pil_image in pil_images])


def grey(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 5).clone()


def test_images_become_rgb_images_of_rounded_levels():
    image = torch.stack([torch.full((2, 5), value) for value in (-1.0, 0.0, 1.0)])[None]
    (pil_image,) = to_images(image)
    assert pil_image.mode == "RGB" and pil_image.size == (5, 2)
    assert pil_image.getpixel((4, 1)) == (0, 128, 255)


def test_what_lies_outside_the_range_is_cut_off():
    assert TopLeft().score(grey(-3.0, 3.0), ["a", "b"]).tolist() == [0.0, 255.0]


def test_scores_are_float32_and_without_gradient():
    scores = TopLeft().score(grey(0.5).requires_grad_(), ["a"])
    assert scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_image_has_no_score_and_spoils_no_other(broken):
    images = grey(-1.0, 0.0, 1.0)
    images[1, 2, 1, 4] = broken
    scores = TopLeft().score(images, ["a", "b", "c"])
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == [0.0, 255.0]


def test_nothing_has_no_scores():
    scores = TopLeft().score(grey(), [])
    assert scores.shape == (0,) and scores.dtype == torch.float32


def test_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"TopLeft scores finished images.*leave out t"):
        TopLeft().score(grey(0.0), ["a"], t=torch.tensor([0]))


@pytest.mark.parametrize("prompts", [[], ["a"], ["a", "b", "c"]])
def test_counts_that_differ_are_refused(prompts):
    with pytest.raises(ValueError, match=f"2 images do not match {len(prompts)} prompts"):
        TopLeft().score(grey(0.0, 1.0), prompts)


@pytest.mark.parametrize("per_batch", [1, 2, 100])
def test_each_image_meets_its_own_prompt_and_each_prompt_is_embedded_once(per_batch):
    directions = {"east": (2.0, 0.0), "north": (0.0, 3.0)}
    seen: list[str] = []

    def embed_prompts(prompts: Sequence[str]) -> Tensor:
        assert len(prompts) <= per_batch
        seen.extend(prompts)
        return torch.tensor([directions[prompt] for prompt in prompts])

    def embed_images(pil_images: Sequence[Image.Image]) -> Tensor:
        assert len(pil_images) <= per_batch
        levels = [pil_image.getpixel((0, 0))[0] / 255 for pil_image in pil_images]
        return torch.tensor([[5 * level, 1 - level] for level in levels])  # white is east

    found = cosines(
        to_images(grey(-1.0, -1.0, 1.0, 1.0)),
        ["north", "east", "east", "north"],
        embed_images=embed_images,
        embed_prompts=embed_prompts,
        images_per_batch=per_batch,
    )
    assert found.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])
    assert seen == ["north", "east"]


def test_scorers_are_found_by_the_names_that_configs_use():
    assert {"clip", "jpeg", "pickscore"} <= set(components.kinds(AbstractScorer))
