from __future__ import annotations

import pytest

from diffalign.errors import DataError
from diffalign.generation.prompts import Prompt, PromptsConfig, read_prompts

FILES = {
    "p.txt": 'a red circle\n\na "blue" square\na red circle\n  a green cross \n',
    "p.tsv": 'Prompt\tCategory\na red circle\tx\na "blue" square\ty\na green cross\tz\n',
    "p.csv": 'id,caption\n0,a red circle\n1,"a ""blue"" square"\n2,a green cross\n',
    "p.jsonl": '{"tag": 1, "prompt": "a red circle"}\n{"prompt": "a \\"blue\\" square"}\n'
    '\n{"prompt": "a green cross"}\n',
    "p.json": '[{"caption": "a red circle", "index": 7}, {"caption": "a \\"blue\\" square"},\n'
    '{"caption": "a green cross"}]',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    prompts = read_prompts(PromptsConfig(file=tmp_path / name))
    assert [prompt.text for prompt in prompts] == [
        "a red circle",
        'a "blue" square',
        "a green cross",
    ]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path, name):
    line = '{"prompt": "a cat\u2028and a dog"}' if name == "p.jsonl" else "a cat\u2028and a dog"
    (tmp_path / name).write_text(f"{line}\n", encoding="utf-8")
    assert read_prompts(tmp_path / name) == [Prompt("a cat\u2028and a dog")]


def test_the_limit_counts_prompts_that_are_used():
    config = PromptsConfig(texts=("a", "a", " ", "b", "c"), limit=2)
    assert [prompt.text for prompt in read_prompts(config)] == ["a", "b"]


def test_an_id_is_readable_and_belongs_to_the_whole_text():
    assert Prompt("A red circle!").prompt_id.startswith("a-red-circle-")
    assert Prompt("a red circle").prompt_id != Prompt("A red circle!").prompt_id
    assert len(Prompt("word " * 500).prompt_id) < 60
    assert Prompt("红色的圆").prompt_id.isascii()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "x", "are read from .txt, .tsv, .csv, .jsonl, .json, not from .yaml"),
        ("p.tsv", "text_id\tlength\n1\t2\n", "no column named prompt, caption, text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt":\n', "line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "line 1 must be an object"),
        ("p.json", '[{"prompt": "a"}', "not JSON"),
        ("p.json", '["a", 1]', "must be a list of prompts, or of objects with a key named prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read_prompts(PromptsConfig(file=tmp_path / name))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(PromptsConfig(file=tmp_path / "p.txt"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such prompt file"):
        read_prompts(PromptsConfig(file=tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("arguments", [{}, {"file": "p.txt", "texts": ("a",)}])
def test_prompts_come_from_exactly_one_place(arguments):
    with pytest.raises(ValueError, match="either file or texts"):
        PromptsConfig(**arguments)
