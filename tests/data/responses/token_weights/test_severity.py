from __future__ import annotations

import pytest

from diffalign.data.responses.token_weights.severity import Severity
from diffalign.data.skipping import UnusableRowError
from tests.data.responses.token_weights.words import judged, response


def weigh(*parts, **settings):
    text, spans = judged(*parts)
    return Severity(**settings).weigh("rejected", {"rejected": response(text)}, {"rejected": spans})


def test_every_token_counts_by_the_mean_score_of_the_parts():
    assert weigh(("a b .", None, 1.0), ("c .", None, 2.0), ("d", None, None)).tolist() == [1.5] * 7
    assert weigh(("a", None, 2.0), scale=0.25).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("score", [None, 0.0, -1.0])
def test_a_response_whose_mistakes_have_no_severity_cannot_be_used(score):
    with pytest.raises(UnusableRowError, match=r"has a score|is above 0"):
        weigh(("a", None, score))
