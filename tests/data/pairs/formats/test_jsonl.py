import json
import math

import pytest

from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from diffalign.errors import DataError
from tests.layouts import make_pairs, write_jsonl


def write_lines(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")


def pairs_in(folder, **settings):
    data = open_data(PairConfig(path=str(folder), resolution=8, **settings))
    return [data.read(data.rows[i]) for i in range(len(data.rows))]


def test_paths_start_from_the_folder_of_the_file(tmp_path):
    write_jsonl(tmp_path / "deep" / "er", make_pairs(2))
    first = pairs_in(tmp_path)[0]
    assert first.chosen == tmp_path / "deep" / "er" / "images" / "0-a.png"
    assert first.sample_id == "deep/er/pairs.jsonl:1"


def test_absolute_paths_are_taken_as_they_are(tmp_path):
    write_lines(tmp_path, {"prompt": "p", "chosen": "/a.png", "rejected": "/b.png"})
    assert str(pairs_in(tmp_path)[0].chosen) == "/a.png"


def test_scores_decide_between_image1_and_image2(tmp_path):
    row = {"prompt": "p", "image1": "1.png", "image2": "2.png", "score1": 1, "score2": 4.5}
    write_lines(tmp_path, row, {**row, "score2": 1}, {**row, "score2": None})
    found = pairs_in(tmp_path)
    assert found[0].chosen == tmp_path / "2.png"
    assert found[1:] == [LeftOut.TIE, LeftOut.UNLABELLED]
    assert pairs_in(tmp_path, labels="lower_is_better")[0].chosen == tmp_path / "1.png"


def test_blank_lines_are_no_rows_and_the_last_needs_no_line_feed(tmp_path):
    row = {"prompt": "ü", "chosen": "a.png", "rejected": "b.png"}
    write_lines(tmp_path, row, "", row)
    assert [pair.sample_id for pair in pairs_in(tmp_path)] == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_a_field_that_one_line_lacks_is_an_empty_one(tmp_path):
    write_lines(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": "a"})
    second = pairs_in(tmp_path)[1]
    assert (second.prompt, second.rejected) == ("", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": ' + "9" * 5000 + "}", "number that is too large"),
        (b"\xff\xff", "not UTF-8"),
    ],
)
def test_a_line_that_is_no_object_is_skipped_by_its_number(line, message, tmp_path):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([good, line, good]))
    found = pairs_in(tmp_path)
    assert [type(pair) for pair in found] == [ImagePair, Skipped, ImagePair]
    assert found[1].sample_id == "pairs.jsonl:2"
    assert "pairs.jsonl:2" in found[1].detail and message in found[1].detail


def test_a_file_without_any_object_is_refused(tmp_path):
    write_lines(tmp_path, "{broken", "[1]")
    with pytest.raises(DataError, match=r"pairs.jsonl:2 is no JSON object"):
        pairs_in(tmp_path)


def test_a_list_in_a_json_file_is_read_alike(tmp_path):
    row = {"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}
    (tmp_path / "train.json").write_text(json.dumps([row, {**row, "prompt": None}, row]))
    found = pairs_in(tmp_path)
    assert found[0].chosen == tmp_path / "b.png"
    assert [pair.sample_id for pair in found][2] == "train.json[2][0,1]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0, 0, 1], [1, 0, 0]]", "numbers of D3PO are read as rollouts.preferences"),
        ("{}", "holds a dict, expected a list of objects"),
        ("[]", "is an empty list"),
        ("{broken", "one object a line is named .jsonl"),
    ],
)
def test_a_json_file_that_is_no_list_of_objects_is_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        pairs_in(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": 7}, SkipReason.MALFORMED),
        ({"rejected": {"url": "x"}}, SkipReason.MALFORMED),
        ({"prompt": ["a", "b"]}, SkipReason.MALFORMED),
        ({"prompt": True}, SkipReason.MALFORMED),
        ({"prompt": "a\0b"}, SkipReason.MALFORMED),
        ({"chosen": "https://example.org/a.png"}, SkipReason.MISSING_IMAGE),
    ],
)
def test_a_value_of_the_wrong_kind_is_skipped(changes, reason, tmp_path):
    row = {"prompt": "p", "chosen": "a.png", "rejected": "b.png"}
    write_lines(tmp_path, row, {**row, **changes}, row)
    found = pairs_in(tmp_path)
    assert isinstance(found[1], Skipped)
    assert found[1].reason is reason


@pytest.mark.parametrize("label", [10**400, "good", [1], {"a": 1}])
def test_a_label_that_is_no_number_is_skipped(label, tmp_path):
    row = {"prompt": "p", "image1": "a.png", "image2": "b.png", "score1": 1, "score2": 2}
    write_lines(tmp_path, row, {**row, "score1": label})
    found = pairs_in(tmp_path)
    assert isinstance(found[1], Skipped)
    assert "score1" in found[1].detail and len(found[1].detail) < 200


@pytest.mark.parametrize("prompt", [None, math.nan, "", "  \n"])
def test_no_caption_is_an_empty_one(prompt, tmp_path):
    write_lines(tmp_path, {"prompt": prompt, "chosen": "a.png", "rejected": "b.png"})
    assert pairs_in(tmp_path)[0].prompt == ""


def test_an_empty_file_is_refused(tmp_path):
    write_lines(tmp_path, "")
    with pytest.raises(DataError, match=r"pairs.jsonl is empty"):
        pairs_in(tmp_path)
