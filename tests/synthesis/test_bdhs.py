"""Responses of a model that sees almost nothing."""

from __future__ import annotations

import pytest

from diffalign.data.responses.questions import Unmade
from diffalign.synthesis.base import Made
from diffalign.synthesis.bdhs import BDHS, cut, flipped, hidden_tokens, sentence_spans
from diffalign.synthesis.similarity import SimilarityConfig
from tests.synthesis.contexts import RESPONSES, context, make, question

ALIKE = SimilarityConfig(kind="language_model")


def bdhs(**settings):
    return BDHS(similarity=ALIKE, **{"max_new_tokens": 5, **settings})


def texts(made):
    return [some.values["rejected"] for some in made]


@pytest.mark.parametrize(
    ("sentence", "turned"),
    [
        ("Yes, there is.", "No, there is."),
        (" no dog.", " yes dog."),
        ("Nothing here.", "Nothing here."),
        ("It is. Yes", "It is. Yes"),
    ],
)
def test_a_leading_verdict_is_turned_round(sentence, turned):
    assert flipped(sentence) == turned


def test_a_cut_leaves_a_word_and_takes_one():
    sentence = "A red cat sits."
    assert [cut(sentence, x) for x in (0.0, 0.34, 0.99)] == ["A", "A red", "A red cat"]
    assert cut("No.", 0.5) == "No"


def test_each_image_token_is_hidden_with_the_probability():
    assert float(hidden_tokens(20_000, 0.99, seed=1).float().mean()) == pytest.approx(
        0.99, abs=3e-3
    )
    assert hidden_tokens(50, 1.0, seed=1).all() and not hidden_tokens(50, 0.0, seed=1).any()


def test_guided_responses_keep_the_beginning_of_every_sentence(tmp_path):
    made = make(bdhs(accept_below=2.0, flip_probability=0.0), tmp_path)
    for number, some in enumerate(made):
        assert isinstance(some, Made), some
        assert some.values["chosen"] == RESPONSES[number]
        assert some.values["attempts"] == 1
        first_word = RESPONSES[number].split()[0].rstrip(".")
        assert some.values["rejected"].startswith(first_word)
    assert " It" in made[0].values["rejected"]  # how its second sentence begins
    assert made[0].values["compared_by"] == "mean hidden states of the language model"


def test_a_verdict_is_turned_round_before_the_cut(tmp_path):
    made = make(bdhs(accept_below=2.0, flip_probability=1.0), tmp_path, count=2)
    assert made[1].values["rejected"].startswith("No,")


def test_what_stays_alike_is_written_freely_at_last(tmp_path):
    method = bdhs(accept_below=-2.0, iterations=3, flip_probability=0.0)
    made = make(method, tmp_path)
    assert [some.values["attempts"] for some in made] == [3] * 4
    assert not all(
        some.values["rejected"].startswith(response.split()[0])
        for some, response in zip(made, RESPONSES, strict=True)
    )


def test_the_true_sentences_before_it_are_given(tmp_path, monkeypatch):
    work = context(tmp_path, [])
    started = []
    go_on = work.writer.go_on
    monkeypatch.setattr(
        work.writer, "go_on", lambda p, text, **k: started.append(text) or go_on(p, text, **k)
    )
    bdhs(accept_below=2.0).open(work)([question(0, tmp_path)])
    assert started[0] == RESPONSES[0]  # whether the context holds it
    assert started[2].startswith("A red cat sits here. It")


def test_batches_and_reruns_change_nothing(tmp_path):
    together = texts(make(bdhs(), tmp_path))
    assert together == texts(make(bdhs(), tmp_path, batch_size=1))
    questions = [question(number, tmp_path) for number in range(4)]
    assert together[2:3] == texts(bdhs().open(context(tmp_path, questions))(questions[2:3]))


def test_a_question_without_an_response_is_left_out(tmp_path):
    work = context(tmp_path, [])
    (some,) = bdhs().open(work)([question(0, tmp_path, response=" ")])
    assert some == Unmade(
        sample_id="row-0", reason="the data set has no response", detail=repr(" ")
    )


def test_the_published_numbers_are_the_defaults():
    method = BDHS()
    assert (method.hide_probability, method.accept_below, method.iterations) == (0.99, 0.97, 5)
    assert method.flip_probability == 0.5


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"hide_probability": 1.5}, "hide_probability must be between 0 and 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        BDHS(**settings)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ("no stop at all", ["no stop at all"]),
        ("It is 3.5 m high.\nYes... no", ["It is 3.5 m high.", "Yes...", "no"]),
        ("", []),
        ("  Space around. ", ["Space around."]),
    ],
)
def test_sentences_end_before_white_space(text, sentences):
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences
