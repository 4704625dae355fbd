from __future__ import annotations

import pytest

from diffalign.data.responses.questions import Unmade
from diffalign.errors import ConfigError
from diffalign.synthesis.base import Made
from diffalign.synthesis.journal import NAME, Journal

LINES = [
    Made(sample_id="a", values={"x": 1}),
    Unmade(sample_id="b", reason="no", detail="why"),
]


def add(journal, lines=LINES) -> None:
    journal.add([journal.row(line) for line in lines])


def test_lines_come_back(tmp_path):
    add(Journal(tmp_path / "new", {"seed": 0}))
    journal = Journal(tmp_path / "new", {"seed": 0})
    assert [journal["a"], journal["b"]] == LINES
    assert "c" not in journal


def test_a_line_is_never_written_twice(tmp_path):
    journal = Journal(tmp_path, {})
    add(journal)
    add(journal, [*LINES, Made(sample_id="c", values={})])
    assert len((tmp_path / NAME).read_text().splitlines()) == 3


def test_half_a_line_does_not_count(tmp_path):
    add(Journal(tmp_path, {}))
    with (tmp_path / NAME).open("a") as file:
        file.write('{"id": "c", "ma')
    journal = Journal(tmp_path, {})
    assert "c" not in journal
    add(journal, [Made(sample_id="c", values={})])
    assert Journal(tmp_path, {})["c"] == Made(sample_id="c", values={})


def test_other_settings_are_refused(tmp_path):
    add(Journal(tmp_path, {"seed": 0}))
    with pytest.raises(ConfigError, match=r"synthesise\.yaml next to it .* another folder"):
        Journal(tmp_path, {"seed": 1})
