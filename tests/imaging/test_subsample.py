from __future__ import annotations

import pytest

from diffalign.imaging.subsample import evenly_spaced, evenly_spaced_with_ends


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "a"), (2, "ae"), (3, "acf"), (9, "abcdefgh")],
)
def test_each_item_is_for_a_part_of_the_list(count, expected):
    assert "".join(evenly_spaced("abcdefgh", count)) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(2, "ah"), (3, "aeh"), (4, "acfh"), (9, "abcdefgh")]
)
def test_the_first_and_the_last_are_there(count, expected):
    assert "".join(evenly_spaced_with_ends("abcdefgh", count)) == expected


def test_of_nothing_there_is_nothing_to_show():
    assert evenly_spaced([], 4) == evenly_spaced_with_ends([], 4) == []
