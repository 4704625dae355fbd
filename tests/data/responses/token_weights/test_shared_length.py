import pytest
import torch

from diffalign.data.responses.token_weights.shared_length import SharedLength
from tests.data.responses.token_weights.words import response

PAIR = {"chosen": response("a b"), "rejected": response("a b c d")}


def test_the_longer_response_counts_less_beyond_the_length_of_the_shorter():
    weights = SharedLength(alpha=0.5)
    assert weights.weigh("chosen", PAIR, {}).tolist() == [1, 1, 1]
    assert weights.weigh("rejected", PAIR, {}).tolist() == [1, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, 0.595864), (0.0, 0.603500)])
def test_losses_of_the_published_fixture(alpha, expected):
    """DPO with beta 0.5 on the three pairs of token log-ratios of TRL's `ld_alpha`."""
    chosen = [[0.2, 0.15, 0.25], [0.1, -0.2], [0.4, 0.3, -0.2, 0.3]]
    rejected = [[-0.2, 0.2, -0.2, -0.2], [-0.1, 0.35, 0.05], [-0.05, -0.05]]
    losses = []
    for sides in zip(chosen, rejected, strict=True):
        texts = {
            name: response(" ".join("x" * (len(ratios) - 1)))
            for name, ratios in zip(("chosen", "rejected"), sides, strict=True)
        }
        scores = [
            SharedLength(alpha=alpha).weigh(name, texts, {}) @ torch.tensor(ratios)
            for name, ratios in zip(("chosen", "rejected"), sides, strict=True)
        ]
        losses.append(-torch.nn.functional.logsigmoid(0.5 * (scores[0] - scores[1])))
    assert float(torch.stack(losses).mean()) == pytest.approx(expected, abs=2e-6)


def test_it_reads_both_responses():
    assert SharedLength(alpha=0.5).reads("chosen") == {"chosen", "rejected"}


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_part_of_a_whole(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        SharedLength(alpha=alpha)
