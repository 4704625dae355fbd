from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import config
from diffalign.errors import CacheError, ConfigError, DataError
from diffalign.files import numbered_lines, read_json, read_json_lines, read_rows, read_text
from diffalign.parsing import checked, decode_text, parse_json, parse_yaml, shortly
from diffalign.training.config import RunConfig

QUICK = settings(max_examples=60, derandomize=True, deadline=None, database=None)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())  # halves of surrogate pairs included
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
yaml_texts = (
    st.text()
    | st.text("[]{}:&*!?-|>'\"#%@,\n\t 0123456789abnulltrue~<=.eExXo_+", max_size=40)
    | json_values.map(json.dumps)
    | st.sampled_from(
        [
            "0b_",
            "0x_",
            "!!int a",
            "!!float a",
            "!!timestamp a",
            "!!binary a",
            "!!python/object:os.system {}",
            "? [a]\n: b",
            "&a [*a]",
            "&a {*a : 1}",
            "1:99",
            "2001-13-45",
            "2001-01-31",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "=",
            "<<: 1",
            "!!null a",
            "!!bool a",
            ".inf",
            "0x" + "f" * 5000,
            "9" * 5000,
            "[" * 5000,
            "{a: " * 200,
            "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\n" + "d: *c\n",
        ]
    )
)


def test_text_is_utf8_or_marked_utf16():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert decode_text("caf\u00e9".encode(encoding), "x") == "caf\u00e9"
    with pytest.raises(DataError, match=r"x: not UTF-8 text .*; save it as UTF-8"):
        decode_text("caf\u00e9".encode("latin-1"), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "x is not JSON that can be read: it is too deep"),
        ("[" * 80 + "]" * 80, "x: lists and objects are more than 64 deep"),
        ("9" * 5000, "x holds a number that is too large"),
        ('["\\ud83d"]', r"x: the text .* holds half a character"),
        ('{"a": 1', "x is not JSON: Expecting"),
        (b"\xff", "x: not UTF-8 text"),
        (b"", "x is not JSON"),
    ],
)
def test_json_that_cannot_be_held_is_a_sentence(text, message):
    with pytest.raises(CacheError, match=message):
        parse_json(text, "x", error=CacheError)


def test_json_that_can_be_held_is():
    assert parse_json('"\\ud83d\\ude00" ', "x") == "\U0001f600"
    assert parse_json('["' + "[" * 100 + '"]', "x") == ["[" * 100]
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2001-13-45: [", "x: not valid YAML"),
        ("!!int a", "x: not valid YAML: ValueError"),
        ("!!binary YWJj", "x: holds a bytes; text, numbers"),
        ("0x" + "f" * 5000, "x: holds a whole number of more than 64 bits"),
        ("&a [*a]", "x: lists and objects are more than 64 deep"),
        ("[" * 5000, "x: not YAML that can be read: it is too deep"),
        ("? [a]\n: b", "x: not valid YAML.*unhashable key"),
        ("{a: 1, a: 2}", "x: not valid YAML.*'a' is given twice"),
    ],
)
def test_yaml_that_cannot_be_held_is_a_sentence(text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_yaml(text, "x", error=ConfigError)


def test_yaml_that_unfolds_without_end_is_refused_at_once():
    bomb = "a0: &a0 [1, 1]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)
    )
    with pytest.raises(DataError, match="more than 100,000 values, aliases unfolded"):
        parse_yaml(bomb, "x")


def test_a_date_is_a_name_and_a_merge_is_one():
    assert parse_yaml("2001-01-31", "x") == "2001-01-31"
    merged = parse_yaml("base: &b {a: 1, c: 2}\nown: {<<: *b, a: 3}", "x")
    assert merged["own"] == {"a": 3, "c": 2}


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: tuple[int, int]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    score: float | None
    flags: Sequence[bool]
    by_name: Mapping[str, int]
    inner: Inner
    rest: Any = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty")


ROW = {
    "name": "x",
    "score": 1,
    "flags": [True],
    "by_name": {"a": 1},
    "inner": {"size": [1, 2]},
    "rest": [[]],
}


def test_a_row_has_the_types_of_its_fields():
    row = checked(Row, ROW, "x")
    assert row == Row(
        name="x",
        score=1.0,
        flags=[True],
        by_name={"a": 1},
        inner=Inner(size=(1, 2)),
        rest=[[]],
    )
    assert isinstance(row.score, float)
    assert checked(list[int], [1], "x") == [1]
    assert checked(Row, {**ROW, "score": None}, "x").score is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, r"x: name: must be text, got 1$"),
        ({"name": ""}, r"x: name is empty$"),
        ({"score": "1"}, r"x: score: must be a finite number, got '1'"),
        ({"score": math.nan}, r"x: score: must be a finite number, got nan"),
        ({"score": True}, r"x: score: must be a finite number, got true"),
        ({"score": 10**400}, r"x: score: must be a finite number, got 1"),
        ({"flags": [1]}, r"x: flags: 0: must be true or false, got 1"),
        ({"flags": "a"}, r"x: flags: must be a list, got 'a'"),
        ({"by_name": {"a": 2**64}}, r"x: by_name: a: must be a whole number of 64 bits"),
        ({"by_name": {"a": False}}, r"x: by_name: a: must be a whole number"),
        ({"inner": {"size": [1]}}, r"x: inner: size: must be a list of 2, got \[1\]"),
        ({"inner": {"size": [1, 2], "kind": "c"}}, r"kind: must be one of 'a', 'b', got 'c'"),
        ({"inner": 3}, r"x: inner: must be an object with size, kind, got 3"),
        ({"more": 1}, r"x must have the keys name, .*, and has also 'more'; the file was not"),
    ],
)
def test_another_type_is_refused_with_its_place(change, message):
    with pytest.raises(DataError, match=message):
        checked(Row, {**ROW, **change}, "x")
    with pytest.raises(DataError, match=r"x must have the keys .*, and has no name"):
        checked(Row, {key: value for key, value in ROW.items() if key != "name"}, "x")


def test_a_value_in_a_message_stays_short():
    assert len(shortly({"a": ["b" * 10_000] * 10_000})) < 300


@QUICK
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_json_or_a_sentence(content):
    try:
        value = parse_json(content, "x")
    except DataError:
        return
    json.dumps(value, ensure_ascii=False).encode()


@QUICK
@given(yaml_texts)
def test_any_text_is_yaml_or_a_sentence(text):
    try:
        value = parse_yaml(text, "x")
    except DataError:
        return
    assert yaml.safe_load(yaml.safe_dump(value)) is not NotImplemented


@QUICK
@given(json_values, st.sampled_from([*ROW]))
def test_any_value_in_a_row_is_taken_or_a_sentence(value, key):
    for given_row in (value, {**ROW, key: value}):
        try:
            checked(Row, given_row, "x")
        except DataError:
            continue


@QUICK
@given(st.binary())
def test_any_file_is_read_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    for read in (
        read_text,
        read_json,
        read_json_lines,
        lambda file: read_rows(Row, file),
        lambda file: list(numbered_lines(file)),
    ):
        try:
            read(path)
        except DataError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("name", ["absent", "a\0b", "x" * 5000, "."])
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path, name):
    with pytest.raises(DataError, match=r"there is no such file|cannot be read"):
        read_text(tmp_path / name)


KEYS = ["model", "model.kind", "objective.beta", "data", "training.steps", "output", "", "a.b.c"]
SHIPPED = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))


@QUICK
@given(st.sampled_from(KEYS) | st.text(max_size=8), yaml_texts)
def test_any_override_gives_a_config_or_a_sentence(key, value):
    try:
        config.load(RunConfig, SHIPPED[0], [f"{key}={value}"])
    except ConfigError:
        return


@QUICK
@given(yaml_texts | st.binary(), st.integers(0, 2000))
def test_any_config_file_gives_a_config_or_a_sentence(tmp_path_factory, text, place):
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    shipped = SHIPPED[place % len(SHIPPED)].read_bytes()
    inserted = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    for content in (inserted, shipped[:place] + inserted + shipped[place:]):
        path.write_bytes(content)
        try:
            config.load(RunConfig, path)
        except ConfigError:
            continue
