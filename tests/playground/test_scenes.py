"""Scenes are a function of their seed, and captions say what they show."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffalign.playground.scenes import (
    HELD_OUT,
    IMAGE_SIZE,
    KINDS,
    PALETTE,
    Kind,
    Object,
    Scene,
    caption,
    describe,
    held_out_prompts,
    parse_caption,
    place,
    preference_prompts,
    render,
    sample_scene,
)


def test_equal_seeds_give_equal_scenes_and_other_seeds_give_others():
    assert sample_scene(7) == sample_scene(7)
    assert len({sample_scene(seed) for seed in range(20)}) == 20


def test_a_generator_moves_on_from_scene_to_scene():
    rng = np.random.default_rng(0)
    assert sample_scene(rng) != sample_scene(rng)


def test_the_render_shows_colour_and_shape_where_the_scene_says():
    triangle = Object(Kind("red", "triangle"), x=20.0, y=30.0, radius=12.0)
    image = render(Scene((triangle,), background=(240, 240, 240)))
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.getpixel((20, 38)) == PALETTE["red"]
    assert image.getpixel((10, 20)) == (240, 240, 240)  # next to the tip
    assert image.getpixel((45, 38)) == (240, 240, 240)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_objects_stay_inside_the_image_and_apart(count):
    for seed in range(200):
        row = place(KINDS[:count], np.random.default_rng(seed)).objects
        edges = [edge for item in row for edge in (item.x - item.radius, item.x + item.radius)]
        assert edges == sorted(edges)
        assert min(edges) > 0
        assert max(edges) < IMAGE_SIZE


def test_four_objects_have_no_place():
    with pytest.raises(ValueError, match="holds 1 to 3 objects, got 4"):
        place(KINDS[:4], np.random.default_rng(0))


def test_captions_name_objects_from_left_to_right_and_parse_back():
    for seed in range(50):
        scene = sample_scene(seed)
        kinds = tuple(item.kind for item in scene.objects)
        assert parse_caption(caption(scene)) == kinds
        assert [item.x for item in scene.objects] == sorted(item.x for item in scene.objects)
    assert describe([Kind("red", "circle"), Kind("blue", "square")]) == (
        "a red circle and a blue square"
    )


@pytest.mark.parametrize(
    "text", ["", "a cat", "a red circle and", "red circle", "a circle red", "a red circle, a cat"]
)
def test_other_texts_are_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match="is not a playground caption: write 'a COLOUR SHAPE'"):
        parse_caption(text)


def test_held_out_combinations_cover_every_colour_once_and_every_shape_evenly():
    assert set(Counter(kind.colour for kind in HELD_OUT).values()) == {1}
    shapes = Counter(kind.shape for kind in HELD_OUT)
    assert len(shapes) == 4
    assert set(shapes.values()) == {1, 2}


def test_the_two_prompt_lists_share_no_combination_and_leave_none_out():
    held_out, others = (
        {kind for text in prompts for kind in parse_caption(text)}
        for prompts in (held_out_prompts(), preference_prompts())
    )
    assert held_out == set(HELD_OUT)
    assert held_out.isdisjoint(others)
    assert held_out | others == set(KINDS)


def test_prompts_are_counted_and_never_repeat():
    assert len(set(held_out_prompts())) == 6 + 6 * 5
    assert len(set(preference_prompts())) == 18 + 18 * 17


def test_palette_colours_are_far_apart():
    colours = np.array(list(PALETTE.values()), dtype=float)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 100


def test_the_files_of_prompts_are_those_of_the_world():
    folder = Path(__file__).parents[2] / "configs/playground"
    assert (folder / "prompts.txt").read_text().splitlines() == preference_prompts()
    assert (folder / "held_out_prompts.txt").read_text().splitlines() == held_out_prompts()
