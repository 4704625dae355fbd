"""The oracle reads what was sampled, and scores it as a careful person would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffalign.playground.oracle import PlaygroundOracle, SeenObject, fidelity, read_objects
from diffalign.playground.scenes import (
    KINDS,
    SIDES,
    Kind,
    Scene,
    caption,
    place,
    render,
    sample_scene,
)

RED_CIRCLE, BLUE_SQUARE = Kind("red", "circle"), Kind("blue", "square")
PAIR = "a red circle and a blue square"


def truth(scene: Scene) -> list[SeenObject]:
    sides = SIDES[len(scene.objects)]
    return [SeenObject(item.kind, side) for item, side in zip(scene.objects, sides, strict=True)]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def test_agrees_with_ground_truth_on_clean_renders():
    scenes = [sample_scene(seed) for seed in range(400)]
    agreed = [read_objects(render(scene)) == truth(scene) for scene in scenes]
    assert np.mean(agreed) >= 0.99


def test_reads_three_objects_as_well():
    scenes = [place(KINDS[i : i + 3], np.random.default_rng(i)) for i in range(20)]
    agreed = [read_objects(render(scene)) == truth(scene) for scene in scenes]
    assert np.mean(agreed) >= 0.9


def test_an_empty_image_and_dirt_show_nothing():
    image = Image.new("RGB", (64, 64), (240, 240, 240))
    assert read_objects(image) == []
    ImageDraw.Draw(image).rectangle((30, 30, 34, 34), fill=(220, 40, 40))
    assert read_objects(image) == []


def test_an_object_of_two_colours_counts_as_two():
    image = render(place([RED_CIRCLE], np.random.default_rng(0)))
    ImageDraw.Draw(image).rectangle((33, 0, 63, 63), fill=(240, 240, 240))
    ImageDraw.Draw(image).rectangle((33, 20, 45, 44), fill=(45, 85, 225))
    assert {item.kind.colour for item in read_objects(image)} == {"red", "blue"}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(RED_CIRCLE, "left"), (BLUE_SQUARE, "right")], 1.0),
        ([(BLUE_SQUARE, "left"), (RED_CIRCLE, "right")], 0.5),  # both there, both misplaced
        ([(RED_CIRCLE, "left")], 0.5),
        ([(RED_CIRCLE, "centre")], 0.25),
        ([(RED_CIRCLE, "left"), (RED_CIRCLE, "right")], 0.5),  # one of them was not asked for
        ([(RED_CIRCLE, "left"), (RED_CIRCLE, "centre"), (BLUE_SQUARE, "right")], 2 / 3),
        ([(Kind("red", "square"), "left"), (Kind("blue", "circle"), "right")], 0.0),
        ([], 0.0),
    ],
)
def test_fidelity_worked_by_hand(seen, expected):
    assert fidelity([SeenObject(kind, side) for kind, side in seen], PAIR) == pytest.approx(
        expected
    )


def test_an_extra_object_halves_a_single():
    seen = [SeenObject(RED_CIRCLE, "centre"), SeenObject(BLUE_SQUARE, "right")]
    assert fidelity(seen, "a red circle") == 0.5


def test_scores_follow_the_prompt_and_have_the_contracts_type():
    image = to_tensor(render(place([RED_CIRCLE, BLUE_SQUARE], np.random.default_rng(0))))
    prompts = [PAIR, "a blue square and a red circle", "a green cross"]
    scores = PlaygroundOracle().score(image.expand(3, -1, -1, -1), prompts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.5, 0.0]


def test_values_outside_the_range_are_clamped_before_reading():
    scene = sample_scene(3)
    scores = PlaygroundOracle().score(to_tensor(render(scene))[None] * 1.2, [caption(scene)])
    assert scores.tolist() == [1.0]


def test_noise_levels_and_uneven_counts_are_refused():
    oracle, images = PlaygroundOracle(), torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match="finished images"):
        oracle.score(images, [PAIR, PAIR], t=torch.zeros(2))
    with pytest.raises(ValueError, match="2 images do not match 1 prompts"):
        oracle.score(images, [PAIR])


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="is not a playground caption"):
        PlaygroundOracle().score(torch.zeros(1, 3, 64, 64), ["a photo of a cat"])
