"""A judge behind an endpoint: what is sent, what is tried again, and what is never asked twice."""

from __future__ import annotations

import threading

import pytest

from diffalign import keys
from diffalign.errors import ConfigError, EndpointError
from diffalign.judges.base import verdicts
from diffalign.judges.endpoint import Endpoint
from tests.judges.chat_server import serving


@pytest.fixture
def server():
    with serving(lambda prompt: f"reply to {prompt}") as state:
        yield state


def endpoint(server, **changes) -> Endpoint:
    settings = {"address": server.address, "model": "tiny", "pause_s": 0.0, **changes}
    return Endpoint(**settings)


def test_every_prompt_gets_its_reply(server):
    prompts = [str(n) for n in range(7)]
    replies = dict(endpoint(server).replies(prompts))
    assert replies == {n: f"reply to {n}" for n in range(7)}
    assert all(r["model"] == "tiny" and r["temperature"] == 0 for r in server.requests)


def test_the_key_comes_from_the_environment_alone(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    list(endpoint(server).replies(["a"]))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OTHER", "other secret")
    list(endpoint(server).replies(["a"]))
    monkeypatch.setattr(keys, "_named", {"OTHER"})
    list(endpoint(server, key_variable="OTHER").replies(["a"]))
    assert server.keys == [None, "Bearer secret", "Bearer other secret"]


def test_a_damaged_key_is_fixed_or_refused_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    list(endpoint(server).replies(["a"]))
    assert server.keys == ["Bearer secret"]
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY has a line break") as e:
        list(endpoint(server).replies(["a"]))
    assert "ret" not in str(e.value)


def test_passing_failures_are_tried_again(server):
    server.failures = [429, 503]
    assert dict(endpoint(server).replies(["a"])) == {0: "reply to a"}
    assert len(server.requests) == 3


def test_a_server_that_asks_to_wait_is_waited_for(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("diffalign.endpoints.time.sleep", pauses.append)
    server.failures, server.headers = [429], {"Retry-After": "7"}
    list(endpoint(server).replies(["a"]))
    assert pauses == [7.0]


def test_pauses_grow(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("diffalign.endpoints.time.sleep", pauses.append)
    server.failures = [500, 500, 500]
    list(endpoint(server, pause_s=1.0).replies(["a"]))
    assert pauses == [1.0, 2.0, 4.0]


def test_lasting_failures_end_it_with_a_sentence(server):
    server.failures = [500] * 3
    with pytest.raises(EndpointError, match=r"did not answer in 3 attempts \(HTTP 500\).*goes on"):
        list(endpoint(server, attempts=3).replies(["a"]))
    with pytest.raises(EndpointError, match="did not answer in 1 attempts"):
        list(endpoint(server, address="http://127.0.0.1:9/v1", attempts=1).replies(["a"]))


def test_a_server_that_never_answers_ends_it_with_a_sentence(server):
    over = threading.Event()
    server.reply = lambda prompt: str(over.wait(60))
    try:
        with pytest.raises(
            EndpointError, match=r"did not answer in 2 attempts \(.*timed out.*goes on"
        ):
            list(endpoint(server, attempts=2, timeout_s=0.3).replies(["a"]))
    finally:
        over.set()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"<html>busy</html>",
        b"{}",
        b"[]",
        b"null",
        b'{"choices": []}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
def test_nonsense_is_asked_for_again_and_then_ends_it_with_a_sentence(server, said):
    server.failures, server.said = [200, 200], said
    with pytest.raises(EndpointError, match=r"did not answer in 2 attempts"):
        list(endpoint(server, attempts=2).replies(["a"]))
    server.failures = [200]
    assert dict(endpoint(server, attempts=2).replies(["a"])) == {0: "reply to a"}


def test_a_refusal_is_not_tried_again_and_shows_no_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.failures = [401]
    with pytest.raises(ConfigError, match=r"HTTP 401; the key is read from .* OPENAI_API_KEY") as e:
        list(endpoint(server).replies(["a"]))
    assert len(server.requests) == 1
    assert "secret" not in str(e.value)


def test_nobody_is_followed_elsewhere(server):
    server.failures, server.headers = [302], {"Location": f"{server.address}/elsewhere"}
    with pytest.raises(ConfigError, match="HTTP 302"):
        list(endpoint(server).replies(["a"]))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"address": "file:///etc"}, "must begin with http"), ({"parallel": 0}, "at least 1")],
)
def test_senseless_settings_are_refused(server, change, message):
    with pytest.raises(ValueError, match=message):
        endpoint(server, **change)


def parse(reply: str) -> str:
    if "unreadable" in reply:
        raise ValueError("unreadable")
    return reply.upper()


def test_a_verdict_is_never_asked_for_twice(server, tmp_path):
    path = tmp_path / "new" / "verdicts.jsonl"
    judge = endpoint(server)
    first = verdicts(judge, {"a": "1", "b": "2"}, parse, saves=path, attempts=1)
    assert first == {"a": "REPLY TO 1", "b": "REPLY TO 2"}
    assert verdicts(judge, {"a": "1", "b": "2"}, parse, saves=path, attempts=1) == first
    assert len(server.requests) == 2
    verdicts(judge, {"a": "1", "b": "other"}, parse, saves=path, attempts=1)
    verdicts(endpoint(server, model="big"), {"a": "1"}, parse, saves=path, attempts=1)
    assert server.prompts[2:] == ["other", "1"]


def test_an_unreadable_reply_is_asked_for_again_and_then_missing(server, tmp_path):
    server.reply = lambda prompt: "unreadable" if len(server.requests) < 3 else "fine"
    path = tmp_path / "verdicts.jsonl"
    assert verdicts(endpoint(server), {"a": "1"}, parse, saves=path, attempts=2) == {}
    assert verdicts(endpoint(server), {"a": "1"}, parse, saves=path, attempts=2) == {"a": "FINE"}


def test_verdicts_before_a_failure_are_kept(server, tmp_path):
    def fail_at_second(prompt: str) -> str:
        server.failures = [400]
        return "fine"

    server.reply = fail_at_second
    path = tmp_path / "verdicts.jsonl"
    judge = endpoint(server, parallel=1)
    with pytest.raises(ConfigError, match="HTTP 400"):
        verdicts(judge, {"a": "1", "b": "2"}, parse, saves=path, attempts=1)
    server.failures, server.reply = [], lambda prompt: "fine"
    found = verdicts(judge, {"a": "1", "b": "2"}, parse, saves=path, attempts=1)
    assert found == {"a": "FINE", "b": "FINE"}
    assert server.prompts == ["1", "2", "2"]


def test_another_file_is_not_taken_for_verdicts(server, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"image_id": 1}\n')
    with pytest.raises(ConfigError, match="holds no verdicts"):
        verdicts(endpoint(server), {"a": "1"}, parse, saves=path, attempts=1)
