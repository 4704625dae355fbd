"""What is particular about a form: pairs that are ordered or tied, spans, further images."""

import json

import pytest

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison, turns_of_template
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.records import Span, Turn
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import rated, write_lines


def opened(folder, *rows):
    return open_responses(ResponseConfig(path=str(write_lines(folder, rows))))


def comparisons(folder, row):
    """What the text of the only row says."""
    (found,) = opened(folder, row).without_images()
    return found


def comparison(folder, row) -> Comparison:
    (found,) = comparisons(folder, row)
    assert isinstance(found, Comparison), found
    return found


def judged(text, spans):
    """Spans as (the text they cover, label, score)."""
    return [(text[span.start : span.end], span.label, span.score) for span in spans]


# TRL


def test_trl_prompts_may_be_plain_text(tmp_path):
    row = {"image": "0.png", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    pair = opened(tmp_path, row).pair(0, 0)
    assert pair.turns == (Turn(role="user", text="<image>\nWhat is it?"),)
    assert pair.responses == {"chosen": "A cat.", "rejected": "A dog."}
    assert pair.images == (tmp_path / "0.png",)


def test_trl_conversations_may_share_their_beginning(tmp_path):
    asked = {"role": "user", "content": "What?"}
    row = {
        "images": ["0.png"],
        "chosen": [asked, {"role": "assistant", "content": "A cat."}],
        "rejected": [asked, {"role": "assistant", "content": "A dog."}],
    }
    found = comparison(tmp_path, row)
    assert found.turns == (Turn(role="user", text="What?"),)
    assert found.responses == {"chosen": "A cat.", "rejected": "A dog."}


def test_trl_images_stand_where_their_blocks_do(tmp_path):
    image, text = {"type": "image"}, {"type": "text", "text": " and "}
    row = forms.trl(0)
    row["prompt"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, text, image, {"type": "text", "text": "differ?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How?"},
    ]
    row["images"] = ["0.png", "1.png"]
    assert opened(tmp_path, row).pair(0, 0).turns == (
        Turn(role="system", text="Be brief."),
        Turn(role="user", text="<image> and <image>differ?"),
        Turn(role="assistant", text="Yes."),
        Turn(role="user", text="How?"),
    )


@pytest.mark.parametrize("images", [[], None])
def test_trl_rows_may_be_text_alone(images, tmp_path):
    row = {"images": images, "prompt": "What?", "chosen": "a", "rejected": "b"}
    pair = opened(tmp_path, forms.trl(0), row).pair(1, 0)
    assert pair.images == ()
    assert pair.turns == (Turn(role="user", text="What?"),)


@pytest.mark.parametrize("images", [["0.png"], ["0.png"] * 3])
def test_trl_markers_must_be_as_many_as_images(images, tmp_path):
    row = {"images": images, "prompt": "<image><image>?", "chosen": "a", "rejected": "b"}
    found = opened(tmp_path, row).pair(0, 0)
    assert isinstance(found, Skipped)
    assert found.reason is SkipReason.MARKERS
    assert found.detail == f"2 <image> in the prompt, and images in the row: {len(images)}"


# VLFeedback


def test_vlfeedback_pairs_every_two_responses_by_mean_rating_without_ties(tmp_path):
    row = forms.vlfeedback(0)
    row["completions"] = [
        rated("best", "5", "5", "5"),
        rated("good", "5", "4", "3"),
        rated("as good", "4", "4", "4"),
        rated("unrated", "5", "N/A", "5"),
    ]
    found = comparisons(tmp_path, row)
    unlabelled = LeftOut.UNLABELLED
    assert [type(f) is Comparison for f in found] == [True, True, False, False, False, False]
    assert [f.responses for f in found[:2]] == [
        {"chosen": "best", "rejected": "good"},
        {"chosen": "best", "rejected": "as good"},
    ]
    assert found[2:] == [unlabelled, LeftOut.TIE, unlabelled, unlabelled]
    assert opened(tmp_path, row).pair(0, 1).sample_id == "pairs.jsonl:1#1"


# mDPO


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("A chat. USER: <image>\nWhat? ASSISTANT:", [("user", "<image>\nWhat?")]),
        ("USER: a ASSISTANT: b</s>USER: c", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        (
            "A chat. USER: <image> a ASSISTANT: b</s> USER: c ASSISTANT:",
            [("user", "<image> a"), ("assistant", "b"), ("user", "c")],
        ),
        ("<image>\nWhat?", [("user", "<image>\nWhat?")]),
        ("<image>\nWhat? ASSISTANT:", [("user", "<image>\nWhat?")]),
    ],
)
def test_mdpo_templates_are_taken_off(prompt, turns):
    assert [(turn.role, turn.text) for turn in turns_of_template(prompt)] == turns


# OPA-DPO


def test_opa_dpo_offers_three_responses_and_scores_of_two(tmp_path):
    found = comparison(tmp_path, forms.opa_dpo(3))
    assert found.responses == {
        "chosen": "It is 3.",
        "rejected": "It is not 3.",
        "revised": "It is 3, perhaps. It is small.",
    }
    assert judged(found.responses["rejected"], found.spans["rejected"]) == [
        ("It is not 3.", "image_recognition_error", 1.0)
    ]
    assert judged(found.responses["revised"], found.spans["revised"]) == [
        ("It is 3, perhaps.", "image_recognition_error", 1.0),
        (" It is small.", None, None),
    ]


def test_opa_dpo_sentences_that_are_misquoted_are_not_judged(tmp_path):
    row = forms.opa_dpo(0)
    row["original_generate_response"] = "One. Two! Three."
    quotes = [("One.", 4), ("Two.", 1), (" Three. ", 2)]
    row["AI_json_report"] = json.dumps(
        {
            str(i): {"copied content": quote, "score": score}
            for i, (quote, score) in enumerate(quotes)
        }
    )
    found = comparison(tmp_path, row)
    assert judged("One. Two! Three.", found.spans["rejected"]) == [
        ("One.", None, 4.0),
        (" Two! ", None, None),
        ("Three.", None, 2.0),
    ]


def test_opa_dpo_repeated_sentences_are_found_one_after_another(tmp_path):
    row = forms.opa_dpo(0)
    row["original_generate_response"] = "A cat. A cat."
    row["AI_json_report"] = json.dumps(
        {str(i): {"copied_content": "A cat.", "score": i + 1} for i in range(2)}
    )
    assert comparison(tmp_path, row).spans["rejected"] == (
        Span(start=0, end=6, score=1.0),
        Span(start=7, end=13, score=2.0),
    )


# Mask-DPO


def test_mask_dpo_sentences_have_labels(tmp_path):
    row = forms.mask_dpo(0)
    row["chosen"] = "A cat.  A dog."
    row["chosen_item"] = {
        "sents": ["A cat. ", "A dog."],
        "type": ["no_hallucination", "hallucination"],
    }
    found = comparison(tmp_path, row)
    assert judged(found.responses["chosen"], found.spans["chosen"]) == [
        ("A cat.", "no_hallucination", None),
        ("A dog.", "hallucination", None),
    ]
    assert judged(found.responses["rejected"], found.spans["rejected"]) == [
        ("It is not 0.", "hallucination", None)
    ]


def test_mask_dpo_responses_may_be_their_sentences(tmp_path):
    row = forms.mask_dpo(0)
    del row["chosen"], row["rejected"]
    row["chosen_item"] = {
        "sents": ["A cat.", "A dog. ", "A fox."],
        "type": ["no_hallucination"] * 3,
    }
    found = comparison(tmp_path, row)
    assert found.responses["chosen"] == "A cat. A dog. A fox."
    assert judged(found.responses["chosen"], found.spans["chosen"])[1][0] == "A dog."


# Rationales


def test_a_rationale_follows_the_chosen_response_and_why_it_is_the_better_one(tmp_path):
    pair = opened(tmp_path, forms.rationale(3)).pair(0, 0)
    assert pair.responses == {
        "chosen": "It is 3.",
        "rejected": "It is not 3.",
        "rationale": "The image shows 3.",
    }
    assert set(pair.own) == {"rationale"} and pair.own["rationale"].images == pair.images
    *before, said, why = pair.own["rationale"].turns
    assert tuple(before) == pair.turns
    assert said == Turn(role="assistant", text="It is 3.")
    assert why.role == "user" and why.text.endswith("It is not 3.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rationale": None}, SkipReason.MALFORMED),
        ({"rationale": " "}, SkipReason.EMPTY_RESPONSE),
        ({"rejected": "It is 0.", "chosen": "It is 0. "}, SkipReason.IDENTICAL),
    ],
)
def test_a_row_without_a_rationale_or_a_preference_is_skipped(change, reason, tmp_path):
    row = {**forms.rationale(0), **change}
    _, (found,) = opened(tmp_path, forms.rationale(1), row).without_images()
    assert isinstance(found, Skipped) and found.reason is reason


# HSA-DPO


def test_hsa_dpo_scores_are_of_whole_responses(tmp_path):
    row = {**forms.hsa_dpo(0), "rejected_score": 2}
    del row["chosen_score"]
    found = comparison(tmp_path, row)
    assert judged(found.responses["rejected"], found.spans["rejected"]) == [
        ("It is not 0.", None, 2.0)
    ]
    assert judged(found.responses["chosen"], found.spans["chosen"]) == [("It is 0.", None, 1.0)]


@pytest.mark.parametrize(
    ("name", "file"), [(7, "7.jpg"), ("svit-7", "svit-7.jpg"), ("7.png", "7.png")]
)
def test_hsa_dpo_images_are_named_by_the_id(name, file, tmp_path):
    pair = opened(tmp_path, {**forms.hsa_dpo(0), "id": name}).pair(0, 0)
    assert pair.images == (tmp_path / file,)
    assert pair.turns == (Turn(role="user", text="<image>\nWhat is 0?"),)


def test_hsa_dpo_sets_with_images_of_their_own_have_another_form(tmp_path):
    assert "read as rlaif_v" in opened(tmp_path, {**forms.hsa_dpo(0), "image": "1.png"}).summary


@pytest.mark.parametrize("score", ["grave", True, float("inf")])
def test_hsa_dpo_scores_are_numbers(score, tmp_path):
    rows = forms.hsa_dpo(0), {**forms.hsa_dpo(1), "rejected_score": score}
    found = opened(tmp_path, *rows).pair(1, 0)
    assert isinstance(found, Skipped) and "rejected_score is no number" in found.detail


# ms-swift and Re-Align: images in place of the images


def test_ms_swift_rejected_images_are_a_condition(tmp_path):
    pair = opened(tmp_path, forms.ms_swift(0)).pair(0, 0)
    assert pair.images == (tmp_path / "0.png",)
    assert pair.other_images == {"rejected": (tmp_path / "9.png",)}


def test_ms_swift_without_rejected_images_has_the_same_ones(tmp_path):
    row = {**forms.ms_swift(0), "rejected_images": None}
    pair = opened(tmp_path, row).pair(0, 0)
    assert pair.other_images == {"rejected": pair.images}


@pytest.mark.parametrize("response", [None, "It is 0."])
def test_ms_swift_responses_may_differ_in_their_images_alone(response, tmp_path):
    row = {**forms.ms_swift(0), "rejected_response": response}
    pair = opened(tmp_path, row).pair(0, 0)
    assert pair.responses == {"chosen": "It is 0.", "rejected": "It is 0."}


def test_ms_swift_same_text_and_same_images_are_identical(tmp_path):
    row = {**forms.ms_swift(0), "rejected_response": "It is 0.", "rejected_images": ["0.png"]}
    found = opened(tmp_path, row).pair(0, 0)
    assert isinstance(found, Skipped)
    assert found.reason is SkipReason.IDENTICAL


def test_ms_swift_rejected_may_be_a_conversation(tmp_path):
    row = forms.ms_swift(0)
    row["rejected_messages"] = [*row["messages"][:1], {"role": "assistant", "content": "No idea."}]
    del row["rejected_response"]
    assert comparison(tmp_path, row).responses["rejected"] == "No idea."


def test_re_align_retrieved_images_are_a_condition(tmp_path):
    pair = opened(tmp_path, forms.re_align(0)).pair(0, 0)
    assert pair.other_images == {"retrieved": (tmp_path / "9.png",)}


def test_sharegpt_system_is_the_first_turn(tmp_path):
    found = comparison(tmp_path, {**forms.sharegpt(0), "system": "Be brief."})
    assert [turn.role for turn in found.turns] == ["system", "user"]


def test_povid_takes_earlier_rounds_into_the_prompt(tmp_path):
    row = forms.povid(0)
    for name in ("conversations", "rejected_conversations"):
        more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": f"{name}."}]
        row[name] = [*forms.povid(0)["conversations"], *more]
    found = comparison(tmp_path, row)
    assert [turn.role for turn in found.turns] == ["user", "assistant", "user"]
    assert found.responses == {"chosen": "conversations.", "rejected": "rejected_conversations."}


def test_alpaca_has_earlier_rounds_and_a_system_prompt(tmp_path):
    row = {**forms.alpaca(0), "system": "Be brief.", "history": [["Who?", "Me.</s>"]]}
    found = comparison(tmp_path, row)
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Me."),
        ("user", "What is\n0?"),
    ]


@pytest.mark.parametrize("label", [None, True])
def test_alpaca_may_have_one_response(label, tmp_path):
    row = {"instruction": "What?", "input": "", "output": "A cat."}
    found = comparison(tmp_path, row if label is None else {**row, "kto_tag": label})
    assert [turn.text for turn in found.turns] == ["What?"]
    assert found.responses == {"chosen": "A cat."}


@pytest.mark.parametrize("change", [{"history": ["Who?"]}, {"input": 3}, {"system": ["x"]}])
def test_alpaca_of_another_shape_is_a_malformed_row(change, tmp_path):
    (found,) = comparisons(tmp_path, {**forms.alpaca(0), **change})
    assert isinstance(found, Skipped) and found.reason is SkipReason.MALFORMED
