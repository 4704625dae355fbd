"""A response is read, and made into tokens, under its own conversation and with its own images."""

import pytest
import torch

from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.records import ResponsePair
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.skipping import Skipped, SkipReason
from tests.data.encoders import encoder
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import write_lines

BOTH = frozenset({"chosen", "rejected"})


def said(role, text):
    return {"role": role, "content": text}


def opened(folder, *rows):
    return open_responses(ResponseConfig(path=str(write_lines(folder, rows))))


def comparison(folder, row):
    (found,) = opened(folder, row).without_images()
    assert isinstance(found[0], Comparison), found
    return found[0]


def reason(folder, row):
    (found,) = opened(folder, row).without_images()
    assert isinstance(found[0], Skipped), found
    return found[0].reason, found[0].side


def texts(turns):
    return [turn.text for turn in turns]


ASKED, SECOND = said("user", "What is it?"), said("user", "Are you sure?")
CAT, DOG, YES = (said("assistant", text) for text in ("A cat.", "A dog.", "Yes."))
LONGER = [ASKED, DOG, SECOND, said("assistant", "No.")]
SHAREGPT = {
    "conversations": [{"from": "human", "value": "What is it?"}],
    "chosen": {"from": "gpt", "value": "A cat."},
    "images": ["0.png"],
}
ROWS = {
    "trl": {"images": ["0.png"], "chosen": [ASKED, CAT], "rejected": LONGER},
    "trl with a prompt": {
        "images": ["0.png"],
        "prompt": [ASKED],
        "chosen": [CAT],
        "rejected": LONGER[1:],
    },
    "trl with a prompt inside": {
        "images": ["0.png"],
        "prompt": "What is it?",
        "chosen": [ASKED, CAT],
        "rejected": LONGER,
    },
    "re_align": {
        "image": "0.png",
        "retrieved_image": "1.png",
        "chosen": [ASKED, CAT],
        "rejected": LONGER,
    },
    "povid": {"image": "0.png", "conversations": [ASKED, CAT], "rejected_conversations": LONGER},
    "ms_swift": {"images": ["0.png"], "messages": [ASKED, CAT], "rejected_messages": LONGER},
    "sharegpt": {**SHAREGPT, "rejected": LONGER[1:]},
}


@pytest.mark.parametrize("form", ROWS)
def test_a_rejected_side_with_more_turns_keeps_them(form, tmp_path):
    found = comparison(tmp_path, ROWS[form])
    assert texts(found.turns) == ["What is it?"]
    assert texts(found.contexts["rejected"]) == ["What is it?", "A dog.", "Are you sure?"]
    assert found.responses == {"chosen": "A cat.", "rejected": "No."}
    pair = opened(tmp_path, ROWS[form]).pair(0, 0)
    assert isinstance(pair, ResponsePair)
    own = pair.conversation("rejected")
    assert own.images == pair.images == (tmp_path / "0.png",)
    assert own.turns[0].text == pair.turns[0].text == "<image>\nWhat is it?"


def test_the_same_beginning_is_shared(tmp_path):
    row = {"images": ["0.png"], "chosen": [ASKED, CAT], "rejected": [ASKED, DOG]}
    assert not comparison(tmp_path, row).contexts


def test_a_system_turn_before_the_prompt_is_kept(tmp_path):
    told = said("system", "Be brief.")
    row = {"prompt": "What is it?", "chosen": [told, ASKED, CAT], "rejected": [told, ASKED, DOG]}
    found = comparison(tmp_path, row)
    assert texts(found.turns) == ["Be brief.", "What is it?"]
    assert not found.contexts


def test_the_same_response_to_other_conversations_is_a_pair(tmp_path):
    row = {"chosen": [ASKED, CAT, SECOND, YES], "rejected": [ASKED, DOG, SECOND, YES]}
    assert comparison(tmp_path, row).contexts.keys() == {"rejected"}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Who?", "rejected": LONGER},
        {"chosen": [ASKED, CAT], "prompt": "Who?"},
        {"rejected": [ASKED, DOG, said("tool", "{}"), CAT]},
        {"rejected": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}, CAT]},
        {"rejected": [ASKED]},
        {"rejected": [{"role": "assistant", "content": 7}]},
        {"rejected": [{"role": "assistant", "content": [{"type": "video", "video": "a.mp4"}]}]},
    ],
)
def test_a_conversation_that_cannot_be_followed_is_skipped(changes, tmp_path):
    row = {"prompt": [ASKED], "chosen": [CAT], "rejected": [DOG], **changes}
    assert reason(tmp_path, row)[0] is SkipReason.MALFORMED


def test_a_context_without_a_question_is_skipped(tmp_path):
    row = {"chosen": [ASKED, CAT], "rejected": [ASKED, DOG, said("user", " "), YES]}
    assert reason(tmp_path, row) == (SkipReason.EMPTY_PROMPT, "rejected")


def test_messages_may_be_json_text(tmp_path):
    import json

    row = {"prompt": json.dumps([ASKED]), "chosen": json.dumps([CAT]), "rejected": "[A dog.]"}
    found = comparison(tmp_path, row)
    assert texts(found.turns) == ["What is it?"]
    assert found.responses == {"chosen": "A cat.", "rejected": "[A dog.]"}


def test_ms_swift_rejected_images_are_those_of_the_rejected_response(tmp_path):
    pair = opened(tmp_path, forms.ms_swift(0)).pair(0, 0)
    assert pair.images == (tmp_path / "0.png",)
    assert pair.own["rejected"].images == (tmp_path / "9.png",)
    assert pair.own["rejected"].turns == pair.turns


def test_ms_swift_rejected_messages_may_show_another_number_of_images(tmp_path):
    asked = said("user", "<image><image> What is 0?")
    row = {
        **forms.ms_swift(0),
        "rejected_images": ["1.png", "2.png"],
        "rejected_messages": [asked, said("assistant", "It is not 0.")],
    }
    del row["rejected_response"]
    pair = opened(tmp_path, row).pair(0, 0)
    assert [image.name for image in pair.own["rejected"].images] == ["1.png", "2.png"]


def shown(name, text):
    return {"role": "user", "content": [{"type": "image", "image": name}, {"text": text}]}


def test_images_in_the_messages_of_a_side_are_its_own(tmp_path):
    row = {
        "chosen": [shown("0.png", "What?"), CAT],
        "rejected": [shown("1.png", "What?"), DOG],
    }
    pair = opened(tmp_path, row).pair(0, 0)
    assert pair.images == (tmp_path / "0.png",)
    assert pair.own["rejected"].images == (tmp_path / "1.png",)


def test_images_in_the_messages_of_one_side_alone_are_unclear(tmp_path):
    row = {
        "chosen": [shown("0.png", "What?"), CAT],
        "rejected": [said("user", "What?"), DOG],
    }
    assert reason(tmp_path, row) == (SkipReason.MARKERS, "rejected")


def sample(pair, views=BOTH, family="llava"):
    maker = TokenSampleMaker(
        config=ResponseConfig(path="x"), views=views, run_seed=0, encoder=encoder(family)
    )
    made = maker.make(pair, 0)
    assert not isinstance(made, Skipped), made
    return made


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_tokens_and_pixels_are_those_of_each_side_alone(family, tmp_path):
    row = {
        "chosen": [shown("0.png", "What?"), CAT],
        "rejected": [shown("3.png", "What is this?"), DOG, SECOND, YES],
    }
    plain = {**row, "rejected": [row["chosen"][0], DOG]}
    write_lines(tmp_path / "alone", [{**row, "chosen": row["rejected"], "rejected": row["chosen"]}])
    data, other = opened(tmp_path / "set", row, plain), opened(tmp_path / "set2", plain)
    samples = [sample(data.pair(i, 0), family=family) for i in range(2)]
    turned = open_responses(ResponseConfig(path=str(tmp_path / "alone")))
    alone = [
        sample(turned.pair(0, 0), frozenset({"chosen"}), family),
        sample(other.pair(0, 0), frozenset({"rejected"}), family),
    ]
    both = stack_tokens(samples, 0)
    expected = stack_tokens(
        [
            *(
                type(s)(
                    **{
                        **vars(s),
                        "responses": {"rejected": s.responses[name]},
                        "views": frozenset({"rejected"}),
                    }
                )
                for s, name in zip(alone, ("chosen", "rejected"), strict=True)
            )
        ],
        0,
    )
    for key, value in vars(both.responses["rejected"]).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(expected.responses["rejected"], key)), key
    own = both.images_of("rejected", None)
    for key, value in expected.image_inputs[None].items():
        assert torch.equal(own[key], value), key
    assert not torch.equal(own["pixel_values"], both.images_of("chosen", None)["pixel_values"])


def test_pixels_are_shared_where_the_images_are(tmp_path):
    pair = opened(tmp_path, ROWS["trl"]).pair(0, 0)
    batch = stack_tokens([sample(pair)], 0)
    assert not batch.own_image_inputs
    assert batch.images_of("rejected", None) is batch.images_of("chosen", None)
