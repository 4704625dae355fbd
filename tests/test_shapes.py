from __future__ import annotations

import pytest
import torch

from diffalign.shapes import check_same_shape, expand_like


def test_rows_are_multiplied_by_their_own_value():
    like = torch.ones(2, 3, 4)
    assert (expand_like(torch.tensor([1.0, 2.0]), like) * like)[:, 0, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(2, 1)])
def test_values_that_are_not_one_per_row_are_refused(values):
    with pytest.raises(ValueError, match="one value per row"):
        expand_like(values, torch.ones(2, 3))


def test_shapes_that_would_broadcast_are_refused_by_name():
    with pytest.raises(ValueError, match=r"policy \(2, 1\), target \(2, 3\)"):
        check_same_shape(policy=torch.ones(2, 1), target=torch.ones(2, 3))
