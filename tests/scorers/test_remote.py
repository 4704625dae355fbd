"""A scorer behind an address: what is sent, what is asked again, what is refused, what is kept."""

from __future__ import annotations

import os
import pickle
import threading

import numpy as np
import pytest
import torch

from diffalign import config, keys
from diffalign.comparison.score import read_column
from diffalign.errors import ConfigError, DataError, EndpointError
from diffalign.jobs import score
from diffalign.scorers.remote import FieldNames, Remote
from tests.jobs.folders import fill
from tests.scorers.score_server import brightness, opened, scoring


@pytest.fixture
def server():
    with scoring() as state:
        yield state


def remote(server, **changes) -> Remote:
    settings = {"address": server.address, "model": "light 1", "pause_s": 0.0, **changes}
    return Remote(**settings)


def grey(*levels: int) -> torch.Tensor:
    values = torch.tensor(levels, dtype=torch.float32) / 127.5 - 1
    return values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


LEVELS = (0, 50, 100, 150, 200, 250, 255)
PROMPTS = [f"prompt {level}" for level in LEVELS]


def test_every_image_gets_its_score_in_requests_of_a_few(server):
    scores = remote(server, images_per_request=3, parallel=3).score(grey(*LEVELS), PROMPTS)
    assert scores.tolist() == pytest.approx(LEVELS)
    assert sorted(server.sizes) == [1, 3, 3]
    by_prompt = {
        prompt: brightness(opened(image))
        for request in server.requests
        for prompt, image in zip(request["prompts"], request["images"], strict=True)
    }
    assert by_prompt == pytest.approx(dict(zip(PROMPTS, LEVELS, strict=True)))
    assert server.requests[0].keys() == {"images", "prompts"} and server.keys == [None] * 3


def test_images_may_be_data_uris_or_jpeg_and_those_are_other_scores(server):
    plain, jpeg = remote(server), remote(server, files="jpeg", images_as="data_uri")
    jpeg.score(grey(100), ["a"])
    (sent,) = server.requests[0]["images"]
    assert sent.startswith("data:image/jpeg;base64,") and opened(sent).format == "JPEG"
    assert plain.fingerprint == "remote-light 1-png" != jpeg.fingerprint
    assert plain.fingerprint != remote(server, model="light 2").fingerprint
    assert plain.fingerprint != remote(server, also={"axis": "r"}).fingerprint
    assert plain.fingerprint == remote(server, address="http://elsewhere/x").fingerprint


def test_the_reward_server_of_flow_factory_is_asked_as_it_wants_to_be():
    names = FieldNames(images="image", prompts="prompt", scores="rewards")
    with scoring(
        images="image", answer=lambda request, images: {"rewards": [1.5] * len(images)}
    ) as server:
        assert remote(server, fields=names).score(grey(1, 2), ["a", "b"]).tolist() == [1.5, 1.5]
        assert server.requests[0].keys() == {"image", "prompt"}
        assert opened(server.requests[0]["image"][0]).format == "PNG"


def test_services_of_flow_grpo_and_verl_omni_speak_pickle_of_plain_values(server):
    scorer = remote(server, body="pickle", files="jpeg", also={"metadata": {}})
    assert scorer.score(grey(10, 200), ["a", "b"]).tolist() == pytest.approx([10, 200])
    (request,) = server.requests
    assert request.keys() == {"images", "prompts", "metadata"} and request["metadata"] == {}
    assert all(isinstance(image, bytes) for image in request["images"])


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("value", [_Harmful(), np.float32(1.0), {1, 2}, print])
def test_a_pickle_that_names_code_is_refused_unread(server, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.answer = lambda request, images: pickle.dumps({"scores": [value]}, protocol=2)
    with pytest.raises(EndpointError, match=r"no pickle of plain lists and numbers .*it holds a"):
        remote(server, body="pickle", attempts=1).score(grey(1), ["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reply", [b"", b"\x80", b"garbage", b"\x80\x04]\x94(K\x01h\x05e."])
def test_bytes_that_are_no_pickle_are_refused(server, reply):
    server.answer = lambda request, images: reply
    with pytest.raises(EndpointError, match=r"no pickle|replies with"):
        remote(server, body="pickle", attempts=1).score(grey(1), ["a"])


def test_passing_failures_are_asked_again_and_the_server_is_waited_for(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("diffalign.endpoints.time.sleep", pauses.append)
    server.failures, server.headers = [503, 500, 429], {"Retry-After": "7"}
    assert remote(server).score(grey(9), ["a"]).tolist() == [9]
    assert pauses == [7.0] * 3 and len(server.requests) == 4


def test_a_server_that_does_not_answer_is_named_and_waits_for_nobody(server):
    server.failures = [503] * 2
    with pytest.raises(EndpointError, match=r"did not answer in 2 attempts \(HTTP 503\).*goes on"):
        remote(server, attempts=2).score(grey(1), ["a"])
    over = threading.Event()
    server.answer = lambda request, images: over.wait(60)
    try:
        with pytest.raises(EndpointError, match="timed out"):
            remote(server, attempts=2, timeout_s=0.2).score(grey(1), ["a"])
    finally:
        over.set()
    assert len(server.requests) == 4
    with pytest.raises(EndpointError, match="did not answer in 1 attempts"):
        remote(server, address="http://127.0.0.1:9/x", attempts=1).score(grey(1), ["a"])


def test_a_slow_answer_is_an_answer(server):
    event = threading.Event()
    server.answer = lambda request, images: (event.wait(0.3), {"scores": [1.0]})[1]
    assert remote(server, attempts=1, timeout_s=30.0).score(grey(1), ["a"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"scores": [1.0]}, "was given 2 images and returned 1 scores"),
        ({"scores": [1.0, 2.0, 3.0]}, "was given 2 images and returned 3 scores"),
        ({"scores": {"a": 1}}, "was given 2 images and returned"),
        ({"scores": [1.0, "2.0"]}, "returned '2.0' where a number belongs"),
        ({"scores": [1.0, True]}, "returned true where a number belongs"),
        ({"scores": [1.0, [2.0]]}, "where a number belongs"),
        ({"error": "no memory"}, "the server says: 'no memory'"),
        (422, "the server refuses it: HTTP 422: failed on purpose"),
    ],
)
def test_what_is_not_one_number_an_image_is_refused(server, reply, message):
    server.answer = lambda request, images: reply
    with pytest.raises(ValueError, match=message):
        remote(server).score(grey(1, 2), ["a", "b"])
    assert len(server.requests) == 1  # asked again it would be the same


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            {"rewards": [1.0]},
            r"without a field 'scores' \(fields: rewards\).*scorer\.fields",
        ),
        ([1.0], "a reply is an object with a field scores"),
        (404, "is not asked like this: HTTP 404"),
        (b"<html>", "did not answer in 6 attempts"),
    ],
)
def test_a_server_of_another_kind_is_no_images_fault(server, reply, message):
    server.answer = lambda request, images: reply
    with pytest.raises(EndpointError, match=message):
        remote(server).score(grey(1), ["a"])


def test_nan_and_null_are_no_scores(server):
    server.answer = lambda request, images: {"scores": [1.0, float("nan"), None]}
    scores = remote(server).score(grey(1, 2, 3), ["a", "b", "c"])
    assert scores[0] == 1 and scores[1:].isnan().all()


def test_a_key_goes_where_the_command_line_says_and_nowhere_else(server, monkeypatch, capsys):
    monkeypatch.setattr(keys, "_named", set())
    monkeypatch.setenv("OPENAI_API_KEY", "not for you")
    monkeypatch.setenv("REWARD_KEY", "hunter22")
    remote(server).score(grey(1), ["a"])
    with pytest.raises(ConfigError, match="would send the environment variable REWARD_KEY"):
        remote(server, key_variable="REWARD_KEY").score(grey(1), ["a"])
    keys.name_on_command_line({"scorer": {"key_variable": "REWARD_KEY"}})
    scorer = remote(server, key_variable="REWARD_KEY")
    scorer.score(grey(1), ["a"])
    scorer.score(grey(2), ["a"])
    assert server.keys == [None, "Bearer hunter22", "Bearer hunter22"]
    said = capsys.readouterr().err
    assert said.count("The key in REWARD_KEY is sent to 127.0.0.1") == 1 and "hunter22" not in said
    server.failures = [401]
    with pytest.raises(ConfigError, match=r"HTTP 401; the key is read from .* REWARD_KEY"):
        scorer.score(grey(1), ["a"])
    server.failures, server.headers = [302], {"Location": "http://127.0.0.1:9/elsewhere"}
    with pytest.raises(EndpointError, match="HTTP 302"):
        scorer.score(grey(1), ["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "ftp://x"}, "address must begin with http"),
        ({"address": "http://u:hunter22@x"}, "holds a user, a password"),
        ({"model": " "}, "model is the name and version"),
        ({"fields": FieldNames(prompts="images")}, "need two names"),
        ({"also": {"prompts": 1}}, "prompts is one of fields"),
        ({"body": "pickle", "images_as": "data_uri"}, "images_as is of JSON"),
        ({"images_per_request": 0}, "at least 1"),
    ],
)
def test_senseless_settings_are_refused(server, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        remote(server, **changes)
    assert "hunter22" not in str(error.value)


def job(folder, server, *more: str) -> None:
    overrides = [f"images={folder}", "scorer.kind=remote", f"scorer.address={server.address}"]
    overrides += ["scorer.model=light", "scorer.pause_s=0", "scorer.images_per_request=4", *more]
    score.run(config.load(score.ScoreConfig, None, overrides))


def test_bad_images_cost_no_other_its_score_and_each_is_reported(tmp_path, server):
    """One over which the server falls, one that it drops, one of which it says NaN."""

    def answer(request, images):
        levels = [round(brightness(image)) for image in images]
        if 10 in levels:
            return 500
        kept = [level for level in levels if level != 20]
        return {"scores": [float("nan") if level == 30 else level for level in kept]}

    server.answer = answer
    fill(tmp_path, {("base", f"p{level}", 0): level for level in (10, 20, 30, *range(40, 50))})
    with pytest.raises(DataError, match="3 images have no score; all others have theirs") as error:
        job(tmp_path, server)
    said = str(error.value)
    assert "HTTP 500" in said and "returned 0 scores" in said and "its score is nan" in said
    column = tmp_path / "scores" / "remote.jsonl"
    assert sorted(read_column(column).values()) == list(range(40, 50))


def test_a_job_whose_server_goes_away_goes_on_where_it_was(tmp_path, server):
    fill(tmp_path, {("base", f"p{level}", 0): level for level in range(12)})
    scored = []

    def answer(request, images):
        if len(server.requests) > 2:
            return 503
        scored.extend(request["prompts"])
        return {"scores": [brightness(image) for image in images]}

    server.answer = answer
    with pytest.raises(EndpointError, match="goes on from there"):
        job(tmp_path, server, "batch_size=4", "scorer.attempts=1")
    again = []
    server.answer = lambda request, images: (
        again.extend(request["prompts"]),
        {"scores": [brightness(image) for image in images]},
    )[1]
    job(tmp_path, server, "batch_size=4", "scorer.attempts=1")
    assert sorted(read_column(tmp_path / "scores" / "remote.jsonl").values()) == list(range(12))
    assert len(scored) == 8 and len(again) == 4 and not {*scored} & {*again}


def test_a_server_that_scores_nothing_at_all_is_given_up(tmp_path, server):
    server.answer = lambda request, images: 500
    fill(tmp_path, {("base", f"p{level}", 0): level for level in range(64)})
    with pytest.raises(EndpointError, match="has not scored any image so far"):
        job(tmp_path, server, "scorer.attempts=1")
    assert len(server.requests) < 30
