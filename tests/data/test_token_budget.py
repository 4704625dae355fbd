"""Which samples of a step go together: by hand, and for steps of all kinds of lengths."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from diffalign.data.token_budget import cut, padded_tokens, padding_share, sequences, share_out


def lengths(seed: int, count: int, rows: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 90) for _ in range(rows)] for _ in range(count)]


def test_the_longest_go_first_to_whoever_has_least():
    assert share_out([9, 1, 5, 4, 8, 3], 2) == [[0, 3, 5], [1, 2, 4]]  # 16 and 14
    assert share_out([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]  # equally many, whatever that takes
    assert share_out([3, 1, 2], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_have_equally_many_samples_and_about_as_many_tokens(ranks):
    sizes = [sum(rows) for rows in lengths(0, 32, 1)]
    shares = share_out(sizes, ranks)
    assert sorted(place for share in shares for place in share) == list(range(32))
    assert {len(share) for share in shares} == {32 // ranks}
    totals = [sum(sizes[place] for place in share) for share in shares]
    assert max(totals) - min(totals) <= 5
    in_order = [sum(sizes[n::ranks]) for n in range(ranks)]
    assert ranks == 1 or max(in_order) - min(in_order) > 40


def test_samples_of_about_one_length_go_together():
    assert cut([[10], [40], [12], [38]], tokens=80) == [[1, 3], [2, 0]]
    assert cut([[10], [40], [12], [38]], tokens=79) == [[1], [3], [2, 0]]  # not [3, 2], [0]
    assert cut([[10], [10], [10], [9]], tokens=30) == [[0, 1, 2], [3]]
    assert cut([[10], [10], [9], [9]], tokens=40) == [[0, 1, 2, 3]]  # two less of padding
    assert cut([[10], [10], [5], [5]], tokens=40) == [[0, 1], [2, 3]]  # ten less
    assert cut([[10, 9], [3, 3]], tokens=20) == [[0], [1]]
    assert cut([[30]], tokens=20) == [[0]]


@pytest.mark.parametrize("pack_to", [None, 100, 10_000])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_micro_batch_has_more_than_its_tokens_and_every_sample_is_in_one(rows, pack_to):
    for seed in range(20):
        samples = lengths(seed, 17, rows)
        parts = cut(samples, tokens=300, pack_to=pack_to)
        assert sorted(place for part in parts for place in part) == list(range(17))
        for part in parts:
            inside = [length for place in part for length in samples[place]]
            assert padded_tokens(inside, pack_to) <= 300
        in_order = [list(chain(*samples[n : n + 3])) for n in range(0, 17, 3)]
        by_length = [list(chain(*(samples[n] for n in part))) for part in parts]
        assert padding_share(by_length, pack_to) < padding_share(in_order)


def test_rows_are_put_one_after_the_other_as_long_as_they_fit():
    assert sequences([3, 4, 2, 9, 1], 7) == [[0, 1], [2], [3], [4]]
    assert sequences([3, 4, 2], None) == [[0], [1], [2]]
    assert padded_tokens([3, 4, 2, 9, 1], 7) == 4 * 9
    assert padded_tokens([3, 4, 2, 9, 1]) == 5 * 9
    assert padding_share([[3, 4], [2]], None) == pytest.approx(1 / 10)
    assert padding_share([[3, 4], [2]], 7) == 0
