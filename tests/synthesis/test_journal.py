from __future__ import annotations

import pytest

from diffalign.errors import ConfigError
from diffalign.synthesis.base import Made, Unmade
from diffalign.synthesis.journal import FAILED, NAME, Journal

LINES = [
    Made(sample_id="a", values={"x": 1}),
    Unmade(sample_id="b", reason="no", detail="why"),
]


def test_lines_come_back(tmp_path):
    Journal(tmp_path / "new", {"seed": 0}).add(LINES)
    journal = Journal(tmp_path / "new", {"seed": 0})
    assert [journal["a"], journal["b"]] == LINES
    assert "c" not in journal


def test_a_line_is_never_written_twice(tmp_path):
    journal = Journal(tmp_path, {})
    journal.add(LINES)
    journal.add([*LINES, Made(sample_id="c", values={})])
    assert len((tmp_path / NAME).read_text().splitlines()) == 3


def test_half_a_line_does_not_count(tmp_path):
    Journal(tmp_path, {}).add(LINES)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"id": "c", "ma')
    journal = Journal(tmp_path, {})
    assert "c" not in journal
    journal.add([Made(sample_id="c", values={})])
    assert Journal(tmp_path, {})["c"] == Made(sample_id="c", values={})


def test_what_failed_is_tried_again_by_the_next_run(tmp_path):
    journal = Journal(tmp_path, {})
    journal.add([*LINES, Unmade(sample_id="c", reason=FAILED, detail="strange")])
    assert journal["c"].detail == "strange"
    again = Journal(tmp_path, {})
    assert "b" in again
    assert "c" not in again


def test_other_settings_are_refused(tmp_path):
    Journal(tmp_path, {"seed": 0}).add(LINES)
    with pytest.raises(ConfigError, match=r"synthesise\.yaml next to it .* another folder"):
        Journal(tmp_path, {"seed": 1})
