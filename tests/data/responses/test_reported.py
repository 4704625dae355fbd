"""Kinds of rows that users of other trainers have reported trouble with."""

import json

import pytest

from diffalign.data.responses.questions import QuestionConfig, open_questions
from diffalign.data.responses.records import ResponsePair
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.errors import ConfigError, DataError
from tests.data.responses.formats.forms import message, write_lines
from tests.data.responses.test_reading import opened, pairs_in

ROW = {"images": ["0.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def only(folder, **changes):
    (pair,) = pairs_in(write_lines(folder, [{**ROW, **changes}]))
    return pair


@pytest.mark.parametrize("bad", ["{broken", "[]", "null", '{"prompt": "cut o', b"\xff"])
def test_a_line_that_is_no_object_costs_itself_alone(bad, tmp_path):
    file = tmp_path / "set.jsonl"
    good = json.dumps(ROW).encode()
    file.write_bytes(b"\n".join([good, bad if isinstance(bad, bytes) else bad.encode(), good]))
    found = list(opened(file).without_images())
    assert [type(each).__name__ for (each,) in found] == ["Comparison", "Skipped", "Comparison"]
    assert found[1][0].reason is SkipReason.MALFORMED and found[1][0].sample_id == "set.jsonl:2"
    kinds = [type(each).__name__ for each in open_questions(QuestionConfig(path=str(file)))]
    assert kinds == ["Question", "Unmade", "Question"]


def test_an_item_of_a_list_that_is_no_object_costs_itself_alone(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps([None, ROW, "x"]))
    found = [type(each).__name__ for (each,) in opened(tmp_path / "set.json").without_images()]
    assert found == ["Skipped", "Comparison", "Skipped"]
    (tmp_path / "set.json").write_text("[null]")
    with pytest.raises(DataError, match=r"set.json\[0\] is no JSON object"):
        opened(tmp_path / "set.json")


@pytest.mark.parametrize("written", [json.dumps, str])
@pytest.mark.parametrize("alone", [True, False])
def test_messages_kept_as_text_are_messages(written, alone, tmp_path):
    """As tables keep them after a round through CSV."""
    responses = {side: message("assistant", f"It's {side}.") for side in ("chosen", "rejected")}
    sides = {side: written(one if alone else [one]) for side, one in responses.items()}
    pair = only(tmp_path, prompt=written([message("user", "What's it?")]), **sides)
    assert isinstance(pair, ResponsePair)
    assert pair.turns[-1].text == "<image>\nWhat's it?"
    assert pair.responses == {"chosen": "It's chosen.", "rejected": "It's rejected."}


def test_messages_as_numpy_prints_them_are_no_response(tmp_path):
    printed = "[{'content': 'Hi', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]"
    pair = only(tmp_path, chosen=printed)
    assert isinstance(pair, Skipped) and "as NumPy prints them" in pair.detail


@pytest.mark.parametrize(
    "text",
    [
        '[{"label": "cat", "box": [1, 2]}]',
        '{"role": "king"}',
        "[{x}]",
        "{'a': 1}",
        '{"content": {"role": "user"}}',
    ],
)
def test_other_responses_in_brackets_stay_as_they_are(text, tmp_path):
    assert only(tmp_path, chosen=text).responses["chosen"] == text


@pytest.mark.parametrize("response", [lambda text: text, lambda text: message("assistant", text)])
def test_the_prompt_may_be_called_messages(response, tmp_path):
    asked = [message("system", "Be brief."), message("user", "<image>What?")]
    row = {
        "messages": asked,
        "chosen": response("a"),
        "rejected": response("b"),
        "images": ["0.png"],
    }
    (pair,) = pairs_in(write_lines(tmp_path, [row]))
    assert [turn.text for turn in pair.turns] == ["Be brief.", "<image>What?"]
    assert pair.responses == {"chosen": "a", "rejected": "b"}


def test_messages_that_end_with_a_response_are_no_prompt(tmp_path):
    whole = [message("user", "What?"), message("assistant", "a")]
    other = [message("user", "What?"), message("assistant", "b")]
    (pair,) = pairs_in(
        write_lines(tmp_path, [{"messages": whole, "chosen": whole, "rejected": other}])
    )
    assert [turn.text for turn in pair.turns] == ["What?"]
    assert pair.responses == {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("name", ["videos", "audios"])
def test_a_row_about_something_that_is_not_seen_is_skipped(name, tmp_path):
    pair = only(tmp_path, **{name: ["a.bin"]})
    assert isinstance(pair, Skipped) and f"the row has {name}" in pair.detail
    for nothing in ([], [None], None, float("nan")):
        assert isinstance(only(tmp_path, **{name: nothing}), ResponsePair)


@pytest.mark.parametrize(
    ("name", "value"),
    [("img", "a.avif"), ("image_path", "coco/139"), ("image_id", 139), ("image_url", "https://x")],
)
def test_a_column_named_like_one_of_images_is_not_passed_over(name, value, tmp_path):
    row = {key: text for key, text in ROW.items() if key != "images"}
    with pytest.raises(ConfigError, match=rf"columns='\{{image: {name}\}}'"):
        opened(write_lines(tmp_path, [{**row, name: value}]))
    assert opened(write_lines(tmp_path, [{**ROW, name: value}]))  # next to the images, a note
    assert opened(write_lines(tmp_path, [{**row, "image_count": 3, "has_image": False}]))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "USER: <image>\nWhat? ASSISTANT:"},
        {"prompt": "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"},
        {"prompt": "[INST] What? [/INST]"},
        {"rejected": "a <|im_start|>user b"},
        {"prompt": "<img>0.png</img>What?"},
        {"chosen": "There <bbox>."},
    ],
)
def test_text_that_holds_a_chat_template_is_skipped(changes, tmp_path):
    pair = only(tmp_path, **changes)
    assert isinstance(pair, Skipped) and "belongs to a chat template" in pair.detail


def test_a_column_named_in_the_config_comes_before_one_that_has_the_name(tmp_path):
    file = write_lines(tmp_path, [{**ROW, "question": "Asked?", "image_path": "1.png"}])
    columns = {"prompt": "question", "images": "image_path"}
    (pair,) = pairs_in(file, columns=columns)
    assert pair.turns[-1].text == "<image>\nAsked?"
    assert pair.images == (tmp_path / "1.png",)
    assert pairs_in(file, columns={"chosen": "rejected", "rejected": "chosen"})[0].responses == {
        "chosen": ROW["rejected"],
        "rejected": ROW["chosen"],
    }
