"""GenEval's rules by what the published code returned, and whole: on the playground, where nothing
is in doubt, and with a Mask2Former of random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.jobs.score import ScoreConfig
from diffalign.playground.detector import PlaygroundDetector
from diffalign.playground.scenes import COLOURS, SHAPES, Kind, place, render
from diffalign.scorers.geneval.config import GenEval
from diffalign.scorers.geneval.detectors.base import Detected, box_of, class_name
from diffalign.scorers.geneval.detectors.detr import DETR
from diffalign.scorers.geneval.detectors.mask2former import Mask2Former
from diffalign.scorers.geneval.rules import COLOURS as COLOURS_OF_GENEVAL
from diffalign.scorers.geneval.rules import (
    Thresholds,
    is_correct,
    kept,
    overlap,
    read_requirements,
    relations,
)
from tests.benchmarks.shared_data import shared_folder


@pytest.mark.parametrize(
    ("box", "other", "found", "shared"),
    [  # by relative_position and compute_iou of djghosh13/geneval
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}, 0.0),
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}, 0.0),
        ((0, 0, 10, 10), (1, 0, 11, 10), set(), 0.8333333333333334),
        ((0, 0, 10, 10), (8, 8, 18, 18), {"left of", "above"}, 0.03862660944206009),
        ((0, 10, 40, 30), (30, 60, 60, 90), {"above"}, 0.0),
    ],
)
def test_positions_and_overlaps_are_those_of_the_published_code(box, other, found, shared):
    assert relations(box, other) == found
    assert overlap(box, other) == pytest.approx(shared)


def write(folder, *rows):
    path = folder / "metadata.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def seen(*objects):
    """Objects of (left, score, colour), of one class, side by side."""
    return [
        Detected(box=(left, 0, left + 9, 9), score=score, colour=colour)
        for left, score, colour in objects
    ]


def judged(folder, found, *, tag="two_object", **row):
    wanted = read_requirements(write(folder, {"tag": tag, "prompt": "p", **row}))["p"]
    return is_correct(wanted, found, lambda objects, name: [o.colour for o in objects])


@pytest.mark.parametrize(
    ("dogs", "include", "exclude", "correct"),
    [
        ([(0, 0.95, "red")], {"count": 1}, [], True),
        ([(0, 0.25, "red")], {"count": 1}, [], False),  # not sure enough
        ([(0, 0.5, "red")], {"count": 1, "tag": "counting"}, [], False),  # of counting: above .9
        ([(0, 0.95, "red"), (20, 0.94, "red")], {"count": 1}, [], True),  # one more is no error
        (
            [(0, 0.95, "red"), (20, 0.94, "red")],
            {"count": 1},
            [{"class": "dog", "count": 2}],
            False,
        ),
        # A red one stands there, but the surest one is blue.
        ([(0, 0.9, "blue"), (20, 0.8, "red")], {"count": 1, "color": "red"}, [], False),
        ([(0, 0.8, "blue"), (20, 0.9, "red")], {"count": 1, "color": "red"}, [], True),
        ([(0, 0.8, "red"), (20, 0.9, "red")], {"count": 2, "color": "red"}, [], True),
        ([(0, 0.8, "blue"), (20, 0.9, "red")], {"count": 2, "color": "red"}, [], False),
    ],
)
def test_objects_counts_and_colours(tmp_path, dogs, include, exclude, correct):
    tag = include.pop("tag", "two_object")
    wanted = [{"class": "dog", **include}]
    found = {"dog": seen(*dogs)}
    assert judged(tmp_path, found, tag=tag, include=wanted, exclude=exclude) is correct


@pytest.mark.parametrize(
    ("cat", "correct"),
    [((40, 0.9, "red"), True), ((0, 0.9, "red"), False), ((40, 0.9, "blue"), False)],
)
def test_a_position_is_to_objects_that_are_right_themselves(tmp_path, cat, correct):
    found = {"cat": seen(cat), "dog": seen((20, 0.9, "black"))}
    include = [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ]
    assert judged(tmp_path, found, include=include) is correct


def test_overlapping_objects_are_one_where_that_is_asked_for():
    found = {"dog": seen((0, 0.9, None), (1, 0.95, None), (30, 0.4, None))}
    assert len(kept(found, "two_object", Thresholds())["dog"]) == 3
    merged = kept(found, "two_object", Thresholds(max_overlap=0.5))["dog"]
    assert [each.score for each in merged] == [0.95, 0.4]
    many = {"dog": seen(*((20 * i, 0.5, None) for i in range(20)))}
    assert len(kept(many, "two_object", Thresholds())["dog"]) == 16


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "line 1: must be an object with the texts tag and prompt"),
        ({"tag": "a", "prompt": "p"}, "include must be a list"),
        ({"tag": "a", "prompt": "p", "include": [{"class": "dog", "count": 0}]}, "a class and a c"),
        (
            {
                "tag": "a",
                "prompt": "p",
                "include": [{"class": "dog", "count": 1, "color": "mauve"}],
            },
            "color is one of red",
        ),
        (
            {
                "tag": "a",
                "prompt": "p",
                "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}],
            },
            "only those before it count",
        ),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"metadata\.jsonl: .*{message}"):
        read_requirements(write(tmp_path, row))


def asked_of(first: Kind, second: Kind, rng) -> dict:
    """Metadata of a made-up prompt about two shapes, and what it asks for as a function."""
    relation = str(rng.choice(["left of", "right of"]))
    return {
        "tag": "position",
        "prompt": f"{second} {relation} {first} {rng.integers(10**9)}",
        "include": [
            {"class": first.shape, "count": 1, "color": first.colour},
            {
                "class": second.shape,
                "count": 1,
                "color": second.colour,
                "position": [relation, 0],
            },
        ],
    }


def test_on_the_playground_it_is_the_truth(tmp_path):
    """Scenes of two shapes, and prompts that ask for them, for others, in either order."""
    rng = np.random.default_rng(0)
    images, rows, truths = [], [], []
    for number in range(80):
        shapes, colours = rng.permutation(SHAPES)[:2], rng.permutation(COLOURS)[:3]
        left, right = (Kind(str(c), str(s)) for c, s in zip(colours, shapes, strict=False))
        wanted = (left, right) if number % 2 else (right, left)
        if number % 5 == 0:
            wanted = (wanted[0], Kind(str(colours[2]), wanted[1].shape))
        row = asked_of(*wanted, rng)
        order = row["include"][1]["position"][0]
        drawn_first = wanted[1] if order == "left of" else wanted[0]
        drawn_last = wanted[0] if order == "left of" else wanted[1]
        truths.append(float((drawn_first, drawn_last) == (left, right)))
        rows.append(row)
        images.append(render(place([left, right], rng)))
    scorer = GenEval(metadata=write(tmp_path, *rows), detector=PlaygroundDetector())
    scores = scorer.score_images(images, [row["prompt"] for row in rows])
    assert scores.tolist() == truths
    assert 20 < sum(truths) < 60


def test_a_prompt_that_the_file_lacks_is_named(tmp_path):
    row = asked_of(Kind("red", "circle"), Kind("blue", "cross"), np.random.default_rng(0))
    scorer = GenEval(metadata=write(tmp_path, row), detector=PlaygroundDetector())
    with pytest.raises(ValueError, match="does not say what 'a dog' asks for"):
        scorer.score_images([Image.new("RGB", (64, 64))], ["a dog"])


def test_a_class_that_the_detector_does_not_find_is_named(tmp_path):
    path = write(tmp_path, {"tag": "a", "prompt": "p", "include": [{"class": "dog", "count": 1}]})
    scorer = GenEval(metadata=path, detector=PlaygroundDetector())
    with pytest.raises(ConfigError, match=r"does not find: dog \(it finds circle, cross"):
        scorer.score_images([Image.new("RGB", (64, 64))], ["p"])


def test_a_config_names_it_and_its_detector(tmp_path):
    row = asked_of(Kind("red", "circle"), Kind("blue", "cross"), np.random.default_rng(0))
    given = [
        f"images={tmp_path}",
        "scorer.kind=geneval",
        f"scorer.metadata={write(tmp_path, row)}",
        "scorer.detector.kind=diffalign.playground.detector",
    ]
    scorer = config.load(ScoreConfig, None, given).scorer
    other = config.load(ScoreConfig, None, [*given, "scorer.counting_score=0.5"]).scorer
    assert isinstance(scorer, GenEval)
    assert scorer.fingerprint != other.fingerprint


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """A network of random weights with 3 classes."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("mask2former")
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    settings = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "dog", 1: "mouse", 2: "tvmonitor"},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(settings).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return Mask2Former(path=str(folder))


def test_a_mask2former_finds_instances_with_masks_and_boxes(mask2former):
    images = [Image.effect_noise((48, 32), 80).convert("RGB")]
    (found,) = mask2former.detect(images)
    assert mask2former.classes == {"dog", "computer mouse", "tv"}
    objects = [each for group in found.values() for each in group]
    assert objects
    for each in objects:
        assert each.mask.shape == (32, 48)
        assert each.box == box_of(each.mask)
        assert 0 < each.score < 1


def test_an_instance_has_the_score_of_its_class_times_that_of_its_mask(mask2former):
    classes = torch.tensor([[0.7, 0.2, 0.05], [0.1, 0.3, 0.5]])
    logits = torch.full((2, 4, 6), -9.0)
    logits[0, 1:3, 2:5] = 2.0
    found = mask2former._instances(classes, logits)  # the second query has an empty mask
    scores = [each.score for name in ("dog", "computer mouse", "tv") for each in found[name]]
    assert scores == pytest.approx([0.8807970780 * p for p in (0.7, 0.2, 0.05)])
    assert found["dog"][0].box == (2, 1, 5, 3)


def test_a_detector_of_boxes_finds_them_by_the_names_of_the_prompts(tmp_path):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    settings = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        num_detection_tokens=5,
        id2label={0: "dog", 1: "remote"},
    )
    torch.manual_seed(0)
    YolosForObjectDetection(settings).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    detector = DETR(path=str(tmp_path))
    (found,) = detector.detect([Image.effect_noise((64, 48), 80).convert("RGB")])
    assert detector.classes == {"dog", "tv remote"}
    assert sum(map(len, found.values())) == 5
    assert all(0 < each.score < 1 for objects in found.values() for each in objects)


def test_colours_are_told_on_the_object_alone():
    seen_by_clip = []

    class Clip:
        """Its feature of an image is its mean colour; those of texts are the colours' own."""

        def features(self, images):
            seen_by_clip.extend(images)
            return torch.tensor(np.array([np.asarray(i).mean(axis=(0, 1)) for i in images]))

        def text_features(self, texts):
            named = {"red": [1.0, 0, 0], "blue": [0, 0, 1.0]}
            return torch.tensor(
                [named.get(next(c for c in COLOURS_OF_GENEVAL if c in t), [0.0] * 3) for t in texts]
            ).double()

    scorer = GenEval(metadata="unused", detector=Mask2Former(path="unused"))
    scorer.__dict__["_clip"] = Clip()
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:6, 12:18] = True
    objects = [
        Detected(box=(0, 0, 10, 10), score=1.0),
        Detected(box=box_of(mask), score=1.0, mask=mask),
    ]
    assert list(scorer._colours_of(image, objects, "cup")) == ["red", "blue"]
    assert seen_by_clip[1].size == (6, 4)


def test_labels_of_coco_go_by_the_names_of_the_prompts():
    assert class_name("mouse") == "computer mouse" and class_name("dog") == "dog"


def test_the_published_metadata_is_read_whole():
    found = read_requirements(shared_folder("prompts") / "geneval_metadata.jsonl")
    assert len(found) == 553
    assert sum(len(each.exclude) for each in found.values()) == 80
