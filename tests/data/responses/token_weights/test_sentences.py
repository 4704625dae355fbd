import pytest

from diffalign.data.responses.records import Span
from diffalign.data.responses.token_weights.sentences import Sentences
from diffalign.data.skipping import SkipReason, UnusableRowError
from tests.data.responses.token_weights.words import judged, response

RIGHT, WRONG = "no_hallucination", "hallucination"


def weigh(name, *parts, **settings):
    text, spans = judged(*((sentence, label, None) for sentence, label in parts))
    return Sentences(**settings).weigh(name, {name: response(text)}, {name: spans}).tolist()


def test_the_chosen_response_keeps_what_is_right_and_its_end():
    weights = weigh("chosen", ("a b .", RIGHT), ("c d .", WRONG), ("e .", RIGHT))
    assert weights == [1, 1, 1, 0, 0, 0, 1, 1, 1]  # a b . | | e . end


def test_the_rejected_response_keeps_what_is_wrong_and_its_end():
    assert weigh("rejected", ("f g .", RIGHT), ("h .", WRONG)) == [0, 0, 0, 1, 1, 1]


def test_a_response_of_which_nothing_is_kept_drops_the_pair():
    with pytest.raises(
        UnusableRowError, match=r"is no_hallucination \(there are hallucination\)"
    ) as info:
        weigh("chosen", ("a b .", WRONG))
    assert (info.value.reason, info.value.side) == (SkipReason.NOTHING_COUNTS, "chosen")


def test_a_row_without_judged_sentences_is_dropped():
    with pytest.raises(UnusableRowError) as info:
        Sentences().weigh("chosen", {"chosen": response("a b")}, {})
    assert info.value.reason is SkipReason.UNJUDGED


def test_text_that_nobody_judged_does_not_count():
    spans = (Span(start=2, end=5, label=RIGHT),)
    weights = Sentences().weigh("chosen", {"chosen": response("a b c d")}, {"chosen": spans})
    assert weights.tolist() == [0, 1, 1, 0, 1]


def test_labels_are_those_of_the_data_set():
    weights = weigh("gold", ("a", "good"), ("b", "fine"), kept={"gold": ("fine",)})
    assert weights == [0, 1, 1]
    with pytest.raises(ValueError, match="asked for revised: say in `kept`"):
        Sentences().reads("revised")
