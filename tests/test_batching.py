from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from diffalign.batching import each_or_error
from diffalign.errors import DiffalignError


def test_bad_items_cost_nothing_but_themselves():
    def invert(items: Sequence[int]) -> list[float]:
        return [1 / item for item in items]

    outcomes = list(each_or_error(invert, [1, 2, 0, 4, 0]))

    assert [item for item, _ in outcomes] == [1, 2, 0, 4, 0]
    assert [result for _, result in outcomes if isinstance(result, float)] == [1.0, 0.5, 0.25]
    assert isinstance(outcomes[2][1], ZeroDivisionError)


def test_a_full_gpu_is_no_items_fault():
    calls = []

    def greedy(items: Sequence[int]) -> Sequence[int]:
        calls.append(list(items))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DiffalignError, match=r"does not hold 3 images.* smaller batch_size"):
        list(each_or_error(greedy, [1, 2, 3]))
    assert calls == [[1, 2, 3]]


def test_a_good_batch_is_called_once():
    calls = []

    def same(items: Sequence[int]) -> Sequence[int]:
        calls.append(list(items))
        return items

    assert list(each_or_error(same, [1, 2, 3])) == [(1, 1), (2, 2), (3, 3)]
    assert calls == [[1, 2, 3]]
