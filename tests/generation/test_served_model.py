"""A model behind an endpoint: what it is sent, that it says what it says here, and what is kept."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from diffalign import config, keys
from diffalign.benchmarks.pope.config import Pope
from diffalign.data.decoding import decode, from_base64
from diffalign.errors import ConfigError, DiffalignError, EndpointError
from diffalign.generation.local_model import load_to_answer
from diffalign.generation.responses import Asking, ImageQuestion, ask
from diffalign.generation.served_model import Ahead, ServedModel
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.processor import question_prompt
from tests.judges.chat_server import serving
from tests.responses import random_image
from tests.tiny_vlm import tiny_llava

TEXTS = ("Is it a cat?", "What is shown here?", "Why?")


@pytest.fixture
def questions(tmp_path) -> list[ImageQuestion]:
    """Two questions about each of two images, first one about either, then the others."""
    for name in "ab":
        random_image("served", name, size=(20, 12)).save(tmp_path / f"{name}.jpg")
    return [
        ImageQuestion(question_id=f"{name}{n}", image=tmp_path / f"{name}.jpg", text=TEXTS[n])
        for n in range(2)
        for name in "ab"
    ]


def asking(folder: Path, server: Any, **changes: Any) -> Asking:
    endpoint = {"address": server.address, "model": "tiny", "pause_s": 0.0, **changes}
    return Asking(
        images=folder,
        saves=folder / "served.jsonl",
        max_new_tokens=6,
        engine="endpoint",
        endpoint=ServedModel(**endpoint),
    )


def kept(folder: Path) -> list[str]:
    path = folder / "served.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["question_id"] for line in lines]


def shown(content: Any) -> tuple[Image.Image, str]:
    image, text = content
    return decode(from_base64(image["image_url"]["url"].partition(",")[2])), text["text"]


def test_a_served_model_says_what_the_same_model_says_here(tmp_path, questions):
    path = str(tiny_llava(tmp_path / "model"))
    here = Asking(images=tmp_path, saves=tmp_path / "here.jsonl", max_new_tokens=6, device="cpu")
    expected = ask(VLM(path=path), questions, here)
    settings = VLM(path=path)
    model: Any = load_to_answer(settings, device="cpu", dtype="auto", rows_at_once=8)
    one_at_a_time = threading.Lock()

    def reply(content: Any) -> str:
        image, text = shown(content)
        with one_at_a_time:
            prompt = question_prompt(model.processor, text)
            return model.generate([prompt], [[image]], max_new_tokens=6)[0]

    with serving(reply) as server:
        assert ask(None, questions, asking(tmp_path, server)) == expected
        assert len(server.requests) == len(questions)
        assert ask(None, questions, asking(tmp_path, server)) == expected
        assert len(server.requests) == len(questions)  # none is asked twice
    assert len(set(expected.values())) > 1
    assert kept(tmp_path) == [q.question_id for q in questions]  # in the order of the questions


def test_a_request_is_greedy_and_holds_every_pixel(tmp_path, questions):
    with serving(lambda content: " yes\n") as server:
        settings = asking(tmp_path, server)
        assert ask(None, questions[:1], settings) == {"a0": "yes"}
        (request,) = server.requests
    content = request.pop("messages")[0]["content"]
    assert request == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 6,
        "repetition_penalty": 1.0,
    }
    image, text = shown(content)
    assert text == TEXTS[0]
    assert ImageChops.difference(image, decode(questions[0].image)).getbbox() is None
    assert settings.figures_depend_on == {"max_new_tokens": 6, "endpoint": "tiny"}


def test_a_system_turn_and_other_fields_are_sent(tmp_path, questions):
    with serving(lambda content: "yes") as server:
        settings = asking(tmp_path, server, fields={})
        told = Asking(**{**vars(settings), "system": "Be brief."})
        ask(None, questions[:1], told)
        (request,) = server.requests
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "repetition_penalty" not in request


NONSENSE = {
    "no JSON": b"<html>busy</html>",
    "no choices": b'{"choices": []}',
    "too many": b'{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}',
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "no string": b'{"choices": [{"message": {"content": [1]}}]}',
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_asked_for_again_and_then_ends_it_with_a_sentence(tmp_path, questions, what):
    with serving(lambda content: "yes") as server:
        server.failures, server.said = [200], NONSENSE[what]
        once = asking(tmp_path, server, parallel=1)
        assert ask(None, questions[:1], once) == {"a0": "yes"}
        server.failures = [200] * 99
        with pytest.raises(EndpointError, match=r"did not answer in 2 attempts \(.*is saved"):
            ask(None, questions, asking(tmp_path, server, parallel=1, attempts=2))
        server.failures = []
        assert len(ask(None, questions, once)) == 4
        # The first one was kept, and is not asked again.
    assert kept(tmp_path)[0] == "a0" and len(kept(tmp_path)) == 4


def test_what_came_before_and_beside_a_failure_is_kept(tmp_path, questions):
    arrived = threading.Barrier(4)

    def reply(content: Any) -> Any:
        arrived.wait(60)  # all four are under way
        if shown(content)[1] == TEXTS[0]:
            return {"message": {"content": None}}
        return "yes"

    with serving(reply) as server:
        with pytest.raises(EndpointError, match="did not answer in 1 attempts"):
            ask(None, questions, asking(tmp_path, server, parallel=4, attempts=1))
        server.reply = lambda content: "no"
        found = ask(None, questions, asking(tmp_path, server))
    assert found == {"a0": "no", "b0": "no", "a1": "yes", "b1": "yes"}
    assert len(server.requests) == 6
    assert sorted(kept(tmp_path)) == ["a0", "a1", "b0", "b1"]


def test_a_refusal_names_the_question_and_what_may_be_left_out(tmp_path, questions):
    with serving(lambda content: "yes") as server:
        server.failures = [400]
        with pytest.raises(
            ConfigError,
            match=r"refuses question a0 \(image a.jpg\): HTTP 400.*fields sends repetition_penalty",
        ):
            ask(None, questions[:1], asking(tmp_path, server))
        server.failures = [401]
        with pytest.raises(ConfigError, match=r"asking.endpoint.key_variable=NAME"):
            ask(None, questions[:1], asking(tmp_path, server))
        assert len(server.requests) == 2


def test_another_model_at_the_endpoint_is_another(tmp_path, questions):
    with serving(lambda content: "yes") as server:
        ask(None, questions[:1], asking(tmp_path, server))
        with pytest.raises(ConfigError, match="responses of another model"):
            ask(None, questions[:1], asking(tmp_path, server, model="other"))


def test_a_key_is_missed_before_anything_is_asked(tmp_path, questions, monkeypatch):
    monkeypatch.setattr(keys, "_named", {"NO_SUCH_KEY"})
    with serving(lambda content: "yes") as server:
        with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
            ask(None, questions, asking(tmp_path, server, key_variable="NO_SUCH_KEY"))
        assert not server.requests


def pope(folder: Path, questions: list[ImageQuestion], *overrides: str) -> Pope:
    path = folder / "questions.json"
    rows = [
        {"question_id": n, "image": q.image.name, "text": q.text, "label": "no"}
        for n, q in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saves = [f"asking.images={folder}", f"asking.saves={folder / 'pope.jsonl'}"]
    return config.load(Pope, None, [f"questions={path}", *saves, *overrides])


def test_pope_of_a_served_model(tmp_path, questions):
    with serving(lambda content: "No") as server:
        at = ["asking.engine=endpoint", f"asking.endpoint.address={server.address}"]
        report = pope(tmp_path, questions, *at, "asking.endpoint.model=tiny").report()
    assert report.whole.figures["accuracy"].value == 100
    assert report.settings["endpoint"] == "tiny"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["asking.engine=endpoint"], "asking.endpoint.address=http"),
        (["asking.endpoint={address: 'http://a/v1', model: b}"], "asking.engine=endpoint"),
        (
            [
                "asking.engine=endpoint",
                "asking.endpoint={address: 'http://a/v1', model: b}",
                "model.kind=vlm",
                "model.path=c",
            ],
            "leave model out",
        ),
        ([], "model and asking go together|or a model to ask"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, questions, overrides, message):
    with pytest.raises(DiffalignError, match=message):
        pope(tmp_path, questions, *overrides)


def test_some_items_are_made_ahead_of_who_takes_them():
    begun: list[int] = []
    fourth = Future[int]()

    def square(n: int) -> int:
        begun.append(n)
        return fourth.result(60) if n == 4 else n * n

    ahead = Ahead(square, range(9), threads=1)
    assert [ahead.take(n) for n in range(3)] == [0, 1, 4]
    fourth.set_exception(ValueError("on purpose"))
    assert ahead.take(6) == 36  # what lies between is left out
    assert ahead.take(7) == 49
    assert set(begun) <= {0, 1, 2, 3, 4, 6, 7, 8}
    with pytest.raises(ValueError, match="on purpose"):
        ahead.take(4)
    ahead.stop()
    assert dict(ahead.finished()) in ({}, {8: 64})
    assert Ahead(lambda n: n + 1, [1, 2], threads=0).take(2) == 3
