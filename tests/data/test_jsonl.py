import json

import pytest

from diffalign.data.reading import open_data
from diffalign.data.records import LeftOut
from diffalign.data.source import DataConfig
from diffalign.errors import DataError
from tests.layouts import make_pairs, write_jsonl


def write_lines(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")


def pairs_in(folder, **settings):
    data = open_data(DataConfig(path=str(folder), resolution=8, **settings))
    return [data.columns.pair(data.rows[i], data.base) for i in range(len(data.rows))]


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


@pytest.mark.parametrize(("line", "message"), [("{broken", "no JSON"), ("[1]", "no JSON object")])
def test_a_line_that_is_no_object_is_refused_by_its_number(line, message, tmp_path):
    write_lines(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, line)
    with pytest.raises(DataError, match=rf"pairs.jsonl:2 is {message}"):
        pairs_in(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    write_lines(tmp_path, "")
    with pytest.raises(DataError, match=r"pairs.jsonl is empty"):
        pairs_in(tmp_path)
