"""CHAIR: the published rules on sentences worked by hand, and the published figures."""

from __future__ import annotations

import json

import pytest

from diffalign.benchmarks.chair.rules import chair_panel, read_captions
from diffalign.errors import DataError
from diffalign.intervals import Bootstrap
from diffalign.response_rules.coco_objects import (
    ObjectWords,
    coco_objects,
    read_image_objects,
    read_synonyms,
)
from diffalign.response_rules.mentions import Caption, check
from tests.benchmarks.shared_data import shared_folder

# A few lines in the form of the published table, its two double blanks included.
TABLE = """\
person, woman, child, baby, adult, passenger
motorcycle, scooter,  motor bike, motor cycle
airplane, plane, jet
train, locomotive
bus
traffic light, street light
bird, duck
cat, kitten
dog, puppy
tie, bow, bow tie
wine glass
hot dog
cake,  cheesecake, cupcake
chair, seat, stool
couch, sofa, settee\x20
dining table, table
toilet
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    return path


@pytest.fixture
def objects_of(table):
    return ObjectWords(synonyms=read_synonyms(table))


@pytest.mark.parametrize(
    ("sentence", "objects"),
    [
        (
            "A baby bird sits near two dogs and a hot dog on a wine glass table.",
            ["bird", "dog", "hot dog", "wine glass", "dining table"],
        ),
        ("A motor bike and a cheesecake next to a passenger jet", ["airplane"]),
        ("A motor cycle and a cupcake", ["motorcycle", "cake"]),
        ("Dogs, a DOG and a puppy", ["dog", "dog", "dog"]),
        ("an adult cat with a baby", ["cat", "person"]),
        ("a passenger train with a passenger", ["train", "person"]),
        ("a man's bow tie", ["tie"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("a seat and a stool", ["chair", "chair"]),
        ("street lights at a home plate", ["traffic light"]),
        ("a train track", []),
        ("a bus between buses", ["bus"]),  # the singulariser leaves "bu" of the first
        ("a settee", ["couch"]),
        ("", []),
    ],
)
def test_objects_of_a_sentence(objects_of, sentence, objects):
    assert objects_of(sentence) == objects


def test_refined_finds_the_two_entries_behind_double_blanks(table):
    objects_of = ObjectWords(synonyms=read_synonyms(table, refined=True))
    sentence = "A motor bike and a cheesecake next to a passenger jet"
    assert objects_of(sentence) == ["motorcycle", "cake", "airplane"]


def test_figures_worked_by_hand(objects_of):
    truths = {"1": {"dog", "person"}, "2": {"cat"}, "3": {"chair", "couch"}}
    captions = [
        Caption(image_id="1", text="A dog, a dog and a cat"),  # 3 mentions, 1 wrong, 1 of 2 found
        Caption(image_id="2", text="A kitten"),  # 1 mention, 1 of 1 found
        Caption(image_id="3", text="Birds and a bird"),  # 2 mentions, both wrong, 0 of 2 found
        Caption(image_id="3", text=""),  # counts as a caption, 0 of 2 found
    ]
    checked = [check(c, frozenset(truths[c.image_id]), objects_of) for c in captions]
    panel = chair_panel(checked, Bootstrap(resamples=200))
    values = {name: figure.value for name, figure in panel.figures.items()}
    assert values == pytest.approx(
        {
            "chair_i": 100 * (1 + 0 + 2 + 0) / (3 + 1 + 2 + 0),
            "chair_s": 100 * 2 / 4,
            "recall": 100 * (1 + 1 + 0 + 0) / (2 + 1 + 2 + 2),
            "repetition_i": 100 * (1 + 0 + 1 + 0) / (3 + 1 + 2 + 0),
            "repetition_s": 100 * 2 / 4,
            "mean_length": (7 + 2 + 4 + 0) / 4,
        }
    )
    assert panel.counts["object_mentions"] == 6
    assert panel.counts["hallucinated_mentions"] == 3


def test_captions_of_one_image_are_one_cluster(objects_of):
    captions = [Caption(image_id="1", text=text) for text in ("a dog", "a cat")]
    checked = [check(c, frozenset({"dog"}), objects_of) for c in captions]
    panel = chair_panel(checked, Bootstrap(resamples=200))
    assert panel.figures["chair_s"].interval is None


def test_captions_that_mention_nothing_leave_chair_i_undefined(objects_of):
    checked = [check(Caption(image_id="1", text="so nice"), frozenset(), objects_of)]
    figures = chair_panel(checked, Bootstrap(resamples=200)).figures
    assert figures["chair_i"].value is None
    assert figures["chair_s"].value == 0
    assert figures["recall"].value is None


def test_coco_annotations_are_merged_as_published(tmp_path, objects_of):
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    instances.write_text(
        json.dumps(
            {
                "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "dining table"}],
                "annotations": [
                    {"image_id": 1, "category_id": 7},
                    {"image_id": 1, "category_id": 7},
                    {"image_id": 2, "category_id": 9},
                ],
            }
        )
    )
    captions.write_text(
        json.dumps(
            {
                "images": [],
                "annotations": [
                    {"image_id": 1, "caption": "Two kittens."},
                    {"image_id": 3, "caption": "Nothing here."},
                ],
            }
        )
    )
    objects = coco_objects([instances], [captions], objects_of)
    assert objects == {"1": {"dog", "cat"}, "2": {"dining table"}, "3": set()}
    with pytest.raises(DataError, match="no annotation file of COCO"):
        coco_objects([captions], [], objects_of)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_id": 1}', "item 1 has no key answer or response or caption or text"),
        ('{"caption": "a"}', "item 1 has no key image_id"),
        ('{"image_id": 1, "caption": 3}', "must be text, got 3"),
        ('{"image_id": 1', "line 1 is not JSON"),
        ("[3]", "item 1 must be an object"),
        ("\n", "holds nothing"),
    ],
)
def test_files_that_are_no_captions_are_refused(tmp_path, content, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(path)


def test_captions_are_read_from_lines_and_from_lists(tmp_path):
    path = tmp_path / "captions.json"
    rows = [{"image_id": 5, "caption": "line\u2028separator"}, {"image_id": "6", "text": "b"}]
    expected = [
        Caption(image_id="5", text="line\u2028separator"),
        Caption(image_id="6", text="b"),
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert read_captions(path) == expected
    path.write_text(json.dumps(rows))
    assert read_captions(path) == expected


def test_a_line_of_the_table_ends_where_files_end_lines(table):
    table.write_bytes("dog, pup\u2028py\r\n\ncat\r\n".encode())
    assert read_synonyms(table).class_of == {"dog": "dog", "pup\u2028py": "dog", "cat": "cat"}
    table.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_synonyms(table)


def test_a_file_of_objects_without_images_is_refused(tmp_path, table):
    path = tmp_path / "objects.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no image"):
        read_image_objects(path, read_synonyms(table))


def test_objects_that_are_no_class_are_refused(tmp_path, table):
    path = tmp_path / "objects.json"
    path.write_text('{"1": ["dog", "puppy", "unicorn"]}')
    with pytest.raises(DataError, match="puppy, unicorn is no class of the table"):
        read_image_objects(path, read_synonyms(table))


def test_two_thousand_real_captions_give_the_published_figures():
    folder = shared_folder("chair")
    expected = json.loads((folder / "expected.json").read_text())
    synonyms = read_synonyms(folder / "synonyms.txt")
    assert len(synonyms.classes) == 80
    objects = read_image_objects(folder / "image_objects.json", synonyms)
    objects_of = ObjectWords(synonyms=synonyms)
    checked = [
        check(caption, objects[caption.image_id], objects_of)
        for caption in read_captions(folder / expected["captions"])
    ]
    panel = chair_panel(checked, Bootstrap(resamples=100))
    for name in ("chair_i", "chair_s", "recall"):
        assert panel.figures[name].value == pytest.approx(expected[name], abs=5e-5)
    for name in ("object_mentions", "hallucinated_mentions"):
        assert panel.counts[name] == expected[name]
    assert panel.counts["captions"] == expected["rows"]
