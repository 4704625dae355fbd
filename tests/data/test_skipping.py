import json

import pytest

from diffalign.data.skipping import SkipLog, Skipped, SkipReason, forget_skipped
from diffalign.errors import DataError


def bad(sample_id, reason=SkipReason.CORRUPT):
    return Skipped(sample_id=sample_id, reason=reason, detail="detail ü", side="chosen")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_sample_reason_detail_and_side(tmp_path):
    log = SkipLog(tmp_path / "run" / "skipped.jsonl")
    log.add(bad("a"))
    assert lines(log.path) == [
        {"sample_id": "a", "reason": "corrupt image", "detail": "detail ü", "side": "chosen"}
    ]


def test_a_sample_is_listed_once(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl")
    log.add(bad("a"))
    log.add(bad("a", SkipReason.MISSING_IMAGE))
    log.add(bad("b", SkipReason.MISSING_IMAGE))
    assert [line["sample_id"] for line in lines(log.path)] == ["a", "b"]
    assert log.counts == {"corrupt image": 1, "missing image": 1}


def test_two_ranks_share_the_list(tmp_path):
    one, two = SkipLog(tmp_path / "skipped.jsonl"), SkipLog(tmp_path / "skipped.jsonl")
    one.add(bad("a"))
    two.add(bad("a"))
    two.add(bad("b"))
    assert [line["sample_id"] for line in lines(one.path)] == ["a", "b"]
    assert len(two) == 2
    one.add(bad("c"))
    assert len(one) == 3
    assert two.counts == {"corrupt image": 3}


def test_a_resumed_run_knows_its_earlier_list(tmp_path):
    SkipLog(tmp_path / "skipped.jsonl").add(bad("a"))
    assert SkipLog(tmp_path / "skipped.jsonl").counts == {"corrupt image": 1}


def test_a_fresh_run_forgets_the_list_of_an_earlier_one(tmp_path):
    path = tmp_path / "skipped.jsonl"
    forget_skipped(path)
    SkipLog(path).add(bad("a"))
    forget_skipped(path)
    assert SkipLog(path).counts == {}


def test_the_lock_is_hidden(tmp_path):
    SkipLog(tmp_path / "skipped.jsonl").add(bad("a"))
    visible = [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert visible == ["skipped.jsonl"]


def test_half_a_line_left_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "skipped.jsonl"
    SkipLog(path).add(bad("a"))
    with path.open("a") as file:
        file.write('{"sample_id": "b", "rea')
    log = SkipLog(path)
    log.add(bad("c"))
    assert [line["sample_id"] for line in lines(path)] == ["a", "c"]


def test_without_a_file_the_list_is_kept_in_memory():
    log = SkipLog(None)
    log.add(bad("a"))
    log.add(bad("a"))
    assert log.counts == {"corrupt image": 1}


def test_the_run_stops_just_above_the_share(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl")
    log.add(bad("a"))
    log.stop_above(0.01, out_of=100)
    log.add(bad("b"))
    message = r"2 of 100 pairs cannot be used.*skipped.jsonl:\n  a \(corrupt image: detail ü\)"
    with pytest.raises(DataError, match=message):
        log.stop_above(0.01, out_of=100)
