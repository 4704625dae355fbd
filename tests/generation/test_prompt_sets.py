"""Published sets of prompts, made up at a small size; the real ones where DIFFALIGN_SHARED_DATA has
them, in `prompts/`."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from diffalign.errors import ConfigError, DataError
from diffalign.generation.prompt_sets.base import find_set
from diffalign.generation.prompts import PromptsConfig, read_prompts
from tests.benchmarks.shared_data import shared_folder

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    'a sign that says "hello"\tArtifacts\tWriting & Symbols\tin quotes\n'
    "ten red apples\tProduce & Plants\tQuantity\t\n"
)
GENEVAL = [
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
    {"tag": "colors", "include": [{"class": "cup", "color": "red"}], "prompt": "a red cup"},
]
FILES = {
    "parti_prompts": ("PartiPrompts.tsv", PARTI),
    "geneval": ("metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in GENEVAL)),
    "drawbench": (
        "DrawBench.csv",
        'Prompts,Category\n"A red car, parked.",Colors\nOne cat,Counting\n',
    ),
    "hpdv2": ("concept-art.json", json.dumps(["a castle in the fog", "an old robot"])),
}
CATEGORIES = {
    "parti_prompts": [
        {"category": "Artifacts", "challenge": "Writing & Symbols"},
        {"category": "Produce & Plants", "challenge": "Quantity"},
    ],
    "geneval": [{"task": "counting"}, {"task": "colors"}],
    "drawbench": [{"category": "Colors"}, {"category": "Counting"}],
    "hpdv2": [{"style": "concept-art"}, {"style": "concept-art"}],
}


def written(folder, name):
    file, content = FILES[name]
    (folder / file).write_text(content)
    return folder / file


@pytest.mark.parametrize("name", FILES)
def test_a_set_is_recognised_with_its_categories(tmp_path, name):
    prompts = read_prompts(written(tmp_path, name))
    assert [dict(prompt.categories) for prompt in prompts] == CATEGORIES[name]


@pytest.mark.parametrize("name", FILES)
def test_a_set_that_is_named_must_be_whole(tmp_path, name, monkeypatch):
    config = PromptsConfig(file=written(tmp_path, name), set=name)
    with pytest.raises(DataError, match=rf"holds 2 prompts, and {name} has \d"):
        read_prompts(config)
    monkeypatch.setattr(type(find_set(name)), "size", 2)
    assert [dict(prompt.categories) for prompt in read_prompts(config)] == CATEGORIES[name]


@pytest.mark.parametrize("name", FILES)
def test_another_file_is_not_taken_for_a_set_that_is_named(tmp_path, name):
    (tmp_path / "mine.csv").write_text("prompt\na cat\n")
    with pytest.raises(DataError, match=f"is not {name}, which has (columns|files)"):
        read_prompts(PromptsConfig(file=tmp_path / "mine.csv", set=name))


def test_plain_takes_the_prompts_alone(tmp_path):
    file = written(tmp_path, "parti_prompts")
    prompts = read_prompts(PromptsConfig(file=file, set="plain"))
    assert prompts[0].text == 'a sign that says "hello"'
    assert not prompts[0].categories


def test_a_folder_holds_all_styles(tmp_path):
    for style in ("anime", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a cat, {style}"]))
    (tmp_path / "other.json").write_text("{}")
    found = [(prompt.text, prompt.categories["style"]) for prompt in read_prompts(tmp_path)]
    assert found == [("a cat, anime", "anime"), ("a cat, photo", "photo")]
    with pytest.raises(DataError, match="holds 2 prompts, and hpdv2 has 3,200"):
        read_prompts(PromptsConfig(file=tmp_path, set="hpdv2"))


def test_a_folder_of_no_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder, and prompts are read from a file"):
        read_prompts(tmp_path)


def test_a_list_of_texts_is_a_file_of_prompts(tmp_path):
    (tmp_path / "mine.json").write_text('["a cat", "a dog"]')
    assert [prompt.text for prompt in read_prompts(tmp_path / "mine.json")] == ["a cat", "a dog"]


def test_columns_of_an_own_file_are_categories(tmp_path):
    (tmp_path / "mine.csv").write_text("Prompt,Topic,Hard\na cat,animals,no\na bolt,tools,yes\n")
    config = PromptsConfig(file=tmp_path / "mine.csv", categories=("Topic", "Hard"))
    assert dict(read_prompts(config)[1].categories) == {"Topic": "tools", "Hard": "yes"}
    wrong = PromptsConfig(file=tmp_path / "mine.csv", categories=("Theme",))
    with pytest.raises(DataError, match=r"no column named Theme.*\(columns: hard, topic, prompt\)"):
        read_prompts(wrong)


def test_a_row_without_its_category_is_named(tmp_path):
    (tmp_path / "p.tsv").write_text(PARTI + "a short row\n")
    with pytest.raises(DataError, match=r"p\.tsv: line 4: lacks category, challenge"):
        read_prompts(tmp_path / "p.tsv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ("a",), "set": "geneval"}, "set and categories are of a file"),
        ({"file": "p.csv", "set": "geneval", "categories": ("a",)}, "are its own"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptsConfig(**arguments)


def test_an_unknown_set_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="parti_prompts"):
        PromptsConfig(file="p.tsv", set="parti_prompt")


@pytest.mark.parametrize(
    ("name", "file", "kinds"),
    [
        ("parti_prompts", "parti_prompts.tsv", {"category": 12, "challenge": 11}),
        ("geneval", "geneval_metadata.jsonl", {"task": 6}),
    ],
)
def test_the_published_files_are_read_whole(name, file, kinds):
    path = shared_folder("prompts") / file
    prompts = read_prompts(PromptsConfig(file=path, set=name))
    assert len(prompts) == find_set(name).size
    for kind, count in kinds.items():
        assert len(Counter(prompt.categories[kind] for prompt in prompts)) == count
    assert [p.categories for p in read_prompts(path)] == [p.categories for p in prompts]
