"""Responses that end in what ends a response already."""

import pytest

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import without_end_tokens
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.skipping import Skipped, SkipReason, UnusableRowError
from tests.data.encoders import FAMILIES, encoder, loaded, response_pair, user
from tests.data.responses.formats.forms import write_lines

OWN_END = {"llava": "</s>", "llava_next": "</s>", "qwen2_vl": "<|im_end|>"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tail", ["{end}", " {end}", "{end}\n", "{end}{end}", "</s>", "<|eot_id|>"])
def test_the_end_is_trained_once(family, tail):
    chat = encoder(family)
    prompt = chat.prompt(user("What?"), [])
    plain = chat.response(prompt, "a red cat")
    ended = chat.response(prompt, "a red cat" + tail.format(end=OWN_END[family]))
    assert ended.input_ids.tolist() == plain.input_ids.tolist()
    assert ended.offsets.tolist() == plain.offsets.tolist()
    end = loaded(family)[1].tokenizer.convert_tokens_to_ids(OWN_END[family])
    assert ended.tokens.tolist().count(end) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_inside_a_response_is_skipped(family):
    chat = encoder(family)
    with pytest.raises(UnusableRowError) as caught:
        chat.response(chat.prompt(user("What?"), []), f"a red{OWN_END[family]} cat")
    assert caught.value.reason is SkipReason.END_INSIDE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("response", ["{end}", " {end} "])
def test_an_end_alone_is_an_empty_response(family, response):
    chat = encoder(family)
    with pytest.raises(UnusableRowError) as caught:
        chat.response(chat.prompt(user("What?"), []), response.format(end=OWN_END[family]))
    assert caught.value.reason is SkipReason.EMPTY_RESPONSE


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A cat.</s>", "A cat."),
        ("A cat. </s> <|endoftext|>", "A cat. "),
        ("A cat.", "A cat."),
        ("Write <s>old</s>", "Write <s>old</s>"),
        ("The tag </s> ends it", "The tag </s> ends it"),
    ],
)
def test_only_ends_at_the_end_are_taken_off(text, kept):
    assert without_end_tokens(text) == kept


@pytest.mark.parametrize("as_messages", [False, True])
def test_sides_that_differ_in_the_end_alone_are_identical(as_messages, tmp_path):
    sides = {"chosen": "A cat.</s>", "rejected": "A cat."}
    if as_messages:
        sides = {s: [{"role": "assistant", "content": text}] for s, text in sides.items()}
    data = open_responses(
        ResponseConfig(path=str(write_lines(tmp_path, [{"prompt": "What?", **sides}])))
    )
    ((found,),) = data.without_images()
    assert isinstance(found, Skipped) and found.reason is SkipReason.IDENTICAL


def test_an_end_of_the_model_s_own_makes_no_difference_either():
    pair = response_pair(responses={"chosen": "a cat <|im_end|>", "rejected": " a cat"})
    maker = TokenSampleMaker(
        config=ResponseConfig(path="x"),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        encoder=encoder("qwen2_vl"),
    )
    made = maker.make(pair, 0)
    assert isinstance(made, Skipped) and made.reason is SkipReason.IDENTICAL


def test_ends_within_the_conversation_are_the_template_s(tmp_path):
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cat.</s>"},
        {"role": "user", "content": "Sure?"},
    ]
    row = {"prompt": turns, "chosen": "Yes.", "rejected": "No."}
    data = open_responses(ResponseConfig(path=str(write_lines(tmp_path, [row]))))
    assert data.pair(0, 0).turns[1].text == "A cat."
