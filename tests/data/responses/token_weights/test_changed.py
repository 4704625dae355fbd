import pytest
import torch

from diffalign.data.responses.chat import EncodedResponse
from diffalign.data.responses.token_weights.changed import Changed, changed_tokens


def response(*ids):
    return EncodedResponse(
        input_ids=torch.tensor([90, 91, *ids]), start=2, offsets=torch.zeros(0, 2), further={}
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([*range(1, 11)], [1, 2, 3, 4, 50, 51, 7, 8, 9, 10], ([4, 5], [4, 5])),
        ([1, 2, 3, 9, 4, 5, 6], [*range(1, 7)], ([], [])),  # inserted, not rewritten
        ([1, 2, 9, 4, 5], [1, 2, 8, 4, 5], ([*range(5)], [*range(5)])),  # matches of two
        ([1, 2, 3], [1, 2, 3], ([], [])),
        ([], [1, 2], ([], [])),
        ([1, 2, 3, 4], [1, 2, 3, 5, 6], ([3], [3, 4])),  # at the end
    ],
)
def test_tokens_that_were_rewritten(first, second, expected):
    assert changed_tokens(first, second) == expected
    assert changed_tokens(second, first) == expected[::-1]


def test_frequent_tokens_of_long_texts_are_compared_too():
    first, second = [1] * 150 + [7] + [1] * 150, [1] * 150 + [8] + [1] * 150
    assert changed_tokens(first, second) == ([150], [150])


def test_the_prompt_that_both_share_counts_as_a_match_before_them():
    encoded = {"chosen": response(5, 1, 2, 3), "rejected": response(6, 7, 1, 2, 3)}
    weights = Changed(normalised=False)
    assert weights.weigh("chosen", encoded, {}).tolist() == [5, 1, 1, 1]
    assert weights.weigh("rejected", encoded, {}).tolist() == [5, 5, 1, 1, 1]


def test_normalised_weights_make_the_sum_a_mean():
    encoded = {"chosen": response(5, 1, 2, 3), "rejected": response(6, 1, 2, 3)}
    weights = Changed(gamma=5).weigh("chosen", encoded, {})
    assert weights.tolist() == pytest.approx([5 / 8, 1 / 8, 1 / 8, 1 / 8])


def test_scores_of_the_published_fixture():
    """Dense DPO on three pairs: log-probs, weights and normalised scores as published."""
    logps, weights = torch.tensor([-0.5, -1.25, -0.75]), torch.tensor([1.0, 5.0, 1.0])
    encoded = {
        "chosen": response(1, 2, 3, 10, 4, 5, 6),
        "rejected": response(1, 2, 3, 11, 4, 5, 6),
    }
    got = Changed(normalised=False).weigh("chosen", encoded, {})[2:5]
    assert got.tolist() == weights.tolist()
    assert float(got @ logps) == -7.5
    assert float(got @ logps / got.sum()) == pytest.approx(-1.071429, abs=1e-6)


def test_what_it_compares_is_read_and_named():
    assert Changed().reads("chosen") == {"chosen", "rejected"}
    with pytest.raises(ValueError, match="compare chosen and rejected, and are asked for gold"):
        Changed().reads("gold")
    assert Changed(between=("revised", "rejected")).reads("revised") == {"revised", "rejected"}


@pytest.mark.parametrize("settings", [{"gamma": -1}, {"between": ("chosen", "chosen")}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"gamma must be at least 0|name two responses"):
        Changed(**settings)
