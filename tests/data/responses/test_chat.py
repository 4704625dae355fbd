import copy

import pytest
import torch

from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.records import Turn
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.errors import ModelError
from tests.data.encoders import FAMILIES, encoder, loaded, processor, user
from tests.layouts import solid_image
from tests.tiny_vlm import tiny_llava

every_family = pytest.mark.parametrize("family", FAMILIES)
IMAGE_IDS = {"llava": "<image>", "llava_next": "<image>", "qwen2_vl": "<|image_pad|>"}
WIDE, TALL = solid_image((200, 0, 0), size=(20, 12)), solid_image((0, 0, 200), size=(8, 30))


def words(family, ids):
    return loaded(family)[1].tokenizer.decode(ids)


def with_own_tokenizer(family):
    """A processor that may be changed."""
    own = copy.copy(loaded(family)[1])
    own.tokenizer = copy.copy(own.tokenizer)
    return own


def image_tokens(family, ids):
    return int((ids == loaded(family)[1].tokenizer.convert_tokens_to_ids(IMAGE_IDS[family])).sum())


@every_family
@pytest.mark.parametrize(
    ("turns", "images"),
    [
        (user("<image>\nWhat is it?"), (WIDE,)),
        (user("<image><image>\nWhich is a cat?"), (WIDE, TALL)),
        (user("First:<image>\nSecond:<image>\nThird:<image>\nIn First, why?"), (WIDE, TALL, WIDE)),
        (user("Why?"), ()),
        ((*user("<image>\nA cat?"), Turn(role="assistant", text="No."), *user("Why?")), (TALL,)),
        ((Turn(role="system", text="Be brief."), *user("What is<image>it?")), (WIDE,)),
    ],
    ids=["one", "leading", "between texts", "no image", "two rounds", "system"],
)
def test_a_row_is_what_the_processor_makes_of_the_whole_text(family, turns, images):
    chat = encoder(family)
    prompt = chat.prompt(turns, images)
    row = chat.response(prompt, "a tall cat")
    before, end = {"qwen2_vl": ("", "<|im_end|>")}.get(family, (" ", "</s>"))
    whole = chat.processor(
        text=[prompt.text + before + "a tall cat" + end],
        images=list(images) or None,
        return_tensors="pt",
    )
    assert row.input_ids.tolist() == whole["input_ids"][0].tolist()
    assert set(row.further) == set(whole) & {"mm_token_type_ids", "token_type_ids"}
    for name, values in row.further.items():
        assert values.tolist() == whole[name][0].tolist()
    assert prompt.image_inputs.keys() == set(whole) - {"input_ids", "attention_mask", *row.further}
    for name, values in prompt.image_inputs.items():
        torch.testing.assert_close(values, whole[name])


@every_family
def test_the_response_is_marked_up_to_the_token_that_ends_it(family):
    chat = encoder(family)
    row = chat.response(chat.prompt(user("<image>\nWhat?"), [WIDE]), "\n a tall cat ")
    end = loaded(family)[1].tokenizer.eos_token
    assert words(family, row.tokens).strip() == f"a tall cat{end}"
    assert row.input_ids[-1] == loaded(family)[1].tokenizer.eos_token_id
    assert row.response_mask.sum() == len(row.tokens)
    assert row.response_mask[-1] and not row.response_mask[row.start - 1]


def test_prompt_and_response_are_tokenised_together():
    chat = encoder("llava")
    row = chat.response(chat.prompt(user("<image>\nWhat?"), [WIDE]), "a cat")
    tokens = loaded("llava")[1].tokenizer.convert_ids_to_tokens(row.tokens.tolist())
    assert tokens == ["Ġa", "Ġ", "cat", "</s>"]  # apart: "Ġ" ends the prompt, and "a" begins


@every_family
def test_offsets_are_characters_of_the_response_as_the_data_set_has_it(family):
    chat = encoder(family)
    response = "\n a tall cat\n\nwaits. "
    row = chat.response(chat.prompt(user("<image>\nWhat?"), [WIDE]), response)
    pieces = [response[start:end] for start, end in row.offsets.tolist()]
    assert "".join(pieces).strip() == response.strip()
    assert pieces[-1] == ""  # the end of the sequence
    for token, piece in zip(row.tokens[:-1], pieces, strict=False):
        assert words(family, [token]).strip() == piece.strip()


@every_family
def test_the_model_finds_as_many_features_as_there_are_image_tokens(family):
    model, _ = loaded(family)
    chat = encoder(family)
    for images in [(WIDE,), (TALL, WIDE, TALL)]:
        prompt = chat.prompt(user("<image>" * len(images) + "\nWhat?"), images)
        row = chat.response(prompt, "a cat")
        with torch.no_grad():
            further = {name: values[None] for name, values in row.further.items()}
            output = model(input_ids=row.input_ids[None], **further, **prompt.image_inputs)
        assert output.logits.shape[:2] == (1, len(row.input_ids))
        assert image_tokens(family, row.input_ids) > len(images)


def test_an_image_may_have_one_token_where_the_processor_counts_them():
    """As an icon has one with Qwen's, if `min_pixels` allows it."""
    model, _ = loaded("qwen2_vl")
    chat = encoder("qwen2_vl")
    prompt = chat.prompt(user("<image>\nWhat?"), [solid_image((200, 0, 0), size=(8, 8))])
    row = chat.response(prompt, "a cat")
    assert image_tokens("qwen2_vl", row.input_ids) == 1
    with torch.no_grad():
        further = {name: values[None] for name, values in row.further.items()}
        model(input_ids=row.input_ids[None], **further, **prompt.image_inputs)


def test_images_between_texts_stay_there_although_the_template_moves_them():
    prompt = encoder("llava").prompt(user("One:<image>\nTwo:<image>\nWhy?"), [WIDE, TALL])
    assert prompt.text == "USER: One:<image>\nTwo:<image>\nWhy? ASSISTANT:"


def test_images_on_one_side_of_the_text_are_laid_out_by_the_template():
    for text in ("<image>\nWhy?", "<image>Why?", "Why?\n<image>"):
        prompt = encoder("llava").prompt(user(text), [WIDE])
        assert prompt.text == "USER: <image>\nWhy? ASSISTANT:"


@every_family
def test_a_row_that_is_too_long_is_refused_and_one_that_just_fits_is_whole(family):
    chat = encoder(family)
    turns = user("<image>\nWhat?")
    length = len(chat.response(chat.prompt(turns, [WIDE]), "a cat").input_ids)
    fits = encoder(family, max_length=length)
    assert len(fits.response(fits.prompt(turns, [WIDE]), "a cat").input_ids) == length
    short = encoder(family, max_length=length - 1)
    with pytest.raises(
        UnusableRowError, match=f"{length} tokens.*allowed are {length - 1}"
    ) as info:
        short.response(short.prompt(turns, [WIDE]), "a cat")
    assert info.value.reason is SkipReason.TOO_LONG


@every_family
@pytest.mark.parametrize(("text", "images"), [("<image>\nA?", ()), ("A?", (WIDE,))])
def test_markers_and_images_have_to_be_as_many(family, text, images):
    with pytest.raises(UnusableRowError, match="markers, and there are") as info:
        encoder(family).prompt(user(text), images)
    assert info.value.reason is SkipReason.MARKERS


@every_family
def test_a_response_or_a_turn_with_an_image_token_in_its_text_is_refused(family):
    chat = encoder(family)
    token = IMAGE_IDS[family]
    with pytest.raises(UnusableRowError, match=r"contains .*represents an image"):
        chat.response(chat.prompt(user("Why?"), []), f"so {token}")
    if token != "<image>":
        with pytest.raises(UnusableRowError, match=r"contains .*represents an image"):
            chat.prompt(user(f"<image> {token}"), [WIDE])


@pytest.mark.parametrize("response", ["", " ", "\n\t"])
def test_an_empty_response_is_refused(response):
    chat = encoder("llava")
    with pytest.raises(UnusableRowError) as info:
        chat.response(chat.prompt(user("Why?"), []), response)
    assert info.value.reason is SkipReason.EMPTY_RESPONSE


@every_family
def test_other_images_of_the_same_size_take_the_place_of_those_of_a_prompt(family):
    chat = encoder(family)
    prompt = chat.prompt(user("<image><image>\nWhat?"), [WIDE, TALL])
    others = [solid_image((0, 200, 0), size=image.size) for image in (WIDE, TALL)]
    image_inputs = chat.image_inputs(prompt, others)
    assert image_inputs.keys() == prompt.image_inputs.keys()
    assert not torch.equal(image_inputs["pixel_values"], prompt.image_inputs["pixel_values"])


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_other_images_of_another_shape_are_refused(family):
    chat = encoder(family)
    prompt = chat.prompt(user("<image>\nWhat?"), [WIDE])
    with pytest.raises(ValueError, match="must have the sizes of those"):
        chat.image_inputs(prompt, [solid_image((0, 0, 0), size=(8, 8))])


def test_a_checkpoint_without_a_chat_template_is_refused():
    own = with_own_tokenizer("llava")
    own.chat_template = own.tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        ChatEncoder(own)


def test_a_template_in_the_tokenizer_serves_as_well():
    own = with_own_tokenizer("qwen2_vl")
    own.tokenizer.chat_template, own.chat_template = own.chat_template, None
    prompt = ChatEncoder(own).prompt(user("<image>\nWhy?"), [WIDE])
    assert prompt.text == encoder("qwen2_vl").prompt(user("<image>\nWhy?"), [WIDE]).text


def test_a_template_whose_prompt_is_no_beginning_of_the_whole_is_refused():
    own = copy.copy(loaded("llava")[1])
    own.chat_template = own.chat_template.replace("'ASSISTANT:'", "'Assistant:'")
    with pytest.raises(ModelError, match="does not continue it"):
        ChatEncoder(own)


@pytest.mark.parametrize("setting", ["patch_size", "vision_feature_select_strategy"])
def test_an_old_processor_that_cannot_count_image_tokens_is_refused(tmp_path, setting):
    own = processor(tiny_llava(tmp_path / "old", **{setting: None}))
    with pytest.raises(ModelError, match=f"lacks {setting}"):
        ChatEncoder(own)
