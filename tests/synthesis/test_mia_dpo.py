"""Questions about one of several images, and which responses to them are kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ModelError
from diffalign.synthesis import layouts
from diffalign.synthesis import mia_dpo as collage
from diffalign.synthesis.base import Made
from diffalign.synthesis.mia_dpo import Collage, sequence_prompt
from tests.synthesis.contexts import RESPONSES, context, make, question


def keeping(form, count, below=1.0, **settings):
    settings = {"max_new_tokens": 4, "layer": 1, "min_perplexity": 0.5, **settings}
    return Collage(keep_below={form: {str(count): below}}, **settings)


def test_the_prompt_of_a_sequence_numbers_its_images():
    assert sequence_prompt("What is it?", target=1, count=2) == (
        "Image1:<image>\nImage2:<image>\nIn Image2, what is it?"
    )


def test_a_sequence_names_its_images_where_they_lie(tmp_path):
    made = make(keeping("sequence", 3), tmp_path)
    for number, some in enumerate(made):
        values = some.values
        assert len(set(values["image"])) == 3
        assert values["image"][values["target"] - 1] == f"{number}.png"
        assert values["prompt"].endswith(f"In Image{values['target']}, what is it?")
        assert values["chosen"] == values["gt"] == RESPONSES[number]
    assert len({some.values["target"] for some in made}) > 1
    assert not (tmp_path / "images").exists()


def test_a_grid_is_kept_without_the_noise_under_which_it_was_answered(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        collage.layouts,
        "noisy_cell",
        lambda *a, **k: seen.append((a[1:], k["sigma"])) or a[0],
    )
    (some, *_) = make(keeping("grid", 2), tmp_path)
    (name,) = some.values["image"]
    sampled = np.asarray(Image.open(tmp_path / name))
    own = layouts.fit(Image.open(tmp_path / "0.png"), layouts.CELL, layouts.CELL)
    left = (some.values["target"] - 1) * (layouts.CELL + layouts.MARGIN)
    assert sampled.shape == (488, 936, 3)
    below = sampled[60 : 40 + own.height, left : left + own.width]  # labels reach into images
    assert (below == np.asarray(own)[20:]).all()
    assert some.values["prompt"] == f"<image>\nIn Image{some.values['target']}, what is it?"
    assert seen[0] == (((1, 2), some.values["target"] - 1), 225.0)


def test_a_image_within_a_image_is_asked_about_its_centre(tmp_path):
    made = make(keeping("pic_in_pic", 2), tmp_path, count=2)
    assert "image in the center, what is it?" in made[0].values["prompt"]
    other = Image.open(tmp_path / "1.png")
    assert Image.open(tmp_path / made[0].values["image"][0]).size == other.size


@pytest.mark.parametrize(("form", "kept"), [("sequence", True), ("grid", False)])
def test_a_share_at_the_threshold_is_kept_of_a_sequence_alone(tmp_path, monkeypatch, form, kept):
    monkeypatch.setattr(collage, "target_share", lambda *_: 0.4)
    made = make(keeping(form, 2, below=0.4), tmp_path, count=2)
    assert [isinstance(some, Made) for some in made] == [kept] * 2
    above = make(keeping(form, 2, below=0.39), tmp_path, count=2)
    assert {some.reason for some in above} == {"the model looked at the right image"}


def test_the_share_of_a_sequence_is_that_of_the_means():
    shown = collage._Shown("sequence", 1, 3, (), "", None)
    maps = [torch.tensor([1.0, 3.0]), torch.tensor([4.0]), torch.tensor([1.0, 1.0, 4.0])]
    assert collage.target_share(shown, maps) == pytest.approx(4 / (2 + 4 + 2))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_perplexity": 1e9}, "the model is sure of its response"),
        ({"max_response_characters": 10}, "response of the data set too long"),
    ],
)
def test_what_the_filters_leave_out_says_why(tmp_path, settings, reason):
    (some, *_) = make(keeping("sequence", 2, **settings), tmp_path)
    assert some.reason == reason


def test_an_response_like_that_of_the_data_set_is_no_pair(tmp_path):
    method = keeping("sequence", 2)
    (some, *_) = make(method, tmp_path)
    questions = [question(number, tmp_path) for number in range(4)]
    same = replace(questions[0], response=some.values["rejected"])
    (again,) = method.open(context(tmp_path, questions))([same])
    assert again.reason == "the responses are the same"


def test_too_few_images_for_a_collage_are_named(tmp_path):
    (some, *_) = make(keeping("sequence", 4), tmp_path, count=3)
    assert (some.reason, some.detail) == ("too few other images", "2 of 3")


def test_a_damaged_image_of_a_table_is_no_companion_and_costs_nobody_else(tmp_path):
    questions = [question(n, tmp_path) for n in range(4)]
    questions[3] = replace(questions[3], images=(b"damaged",))
    method = keeping("sequence", 3)
    made = method.open(context(tmp_path, questions))(questions[:3])
    assert all(isinstance(some, Made) for some in made)


def test_every_form_is_sampled_and_batches_change_nothing(tmp_path):
    method = Collage(
        keep_below={"sequence": {"2": 1.0}, "pic_in_pic": {"2": 1.0}},
        max_new_tokens=4,
        layer=1,
    )
    made = make(method, tmp_path)
    assert {some.values["collage"] for some in made} == {"sequence", "pic_in_pic"}
    alone = make(method, tmp_path, batch_size=1)
    assert [some.values["rejected"] for some in alone] == [s.values["rejected"] for s in made]


def test_qwen_has_parts_and_tiles_of_llava_next_have_none(tmp_path):
    (some, *_) = make(keeping("pic_in_pic", 2), tmp_path, family="qwen2_vl")
    assert 0 <= some.values["attention"] <= 1
    assert make(keeping("sequence", 2), tmp_path, family="llava_next")
    with pytest.raises(ModelError, match="no single rectangle"):
        make(keeping("pic_in_pic", 2), tmp_path, family="llava_next")


def test_a_layer_that_the_model_lacks_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ModelError, match="layer is 16"):
        make(Collage(), tmp_path)


def test_the_published_table_is_the_default():
    assert Collage().keep_below == {
        "sequence": {"2": 0.8, "3": 0.7, "4": 0.6, "5": 0.6},
        "grid": {"2": 0.7, "3": 0.6, "4": 0.5, "6": 0.4, "9": 0.3},
        "pic_in_pic": {"2": 0.8},
    }
    method = Collage()
    assert (method.layer, method.min_perplexity, method.max_response_characters) == (16, 1.1, 512)
    assert (method.grid_noise, method.pic_in_pic_noise) == (225, 49)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"circle": {"2": 0.5}}, "there are sequence, grid, pic_in_pic"),
        ({"grid": {"5": 0.5}}, "a grid has 2, 3, 4, 6, 9"),
        ({"sequence": {}}, "must have a form"),
    ],
)
def test_collages_that_there_are_not_are_refused(table, complaint):
    with pytest.raises(ValueError, match=complaint):
        Collage(keep_below=table)
