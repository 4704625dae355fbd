"""Whatever a file holds, its reader reads it or says in a sentence what is wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.readers import READERS, damaged, outcome, prepared


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name, tmp_path):
    reader = prepared(READERS[name], tmp_path)
    assert outcome(reader, tmp_path, reader.good()) == "read"

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(st.randoms(use_true_random=False))
    def damage(chance: random.Random) -> None:
        outcome(reader, tmp_path, damaged(reader.good(), chance))

    @settings(max_examples=5, derandomize=True, deadline=None, database=None)
    @given(st.binary())
    def replace(content: bytes) -> None:
        outcome(reader, tmp_path, content)

    damage()
    replace()
