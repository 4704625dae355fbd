"""The server over HTTP: the protocol of the page, and what it refuses."""

from __future__ import annotations

import json

import pytest

from diffalign.data.responses.config import ResponseConfig
from diffalign.errors import ConfigError
from diffalign.labelling.server import listen
from diffalign.labelling.sources import GeneratedImages, PairsOfResponses
from diffalign.pages.guard import Guard
from tests.labelling.builders import Client, generated, responses, served

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    return GeneratedImages(generated(tmp_path_factory.mktemp("look"), prompts=40))


def test_one_answer_after_the_other_until_there_is_no_more(look, tmp_path):
    with served(look, tmp_path, order=range(4)) as (port, _):
        ana = Client(port, "Ana")
        for done, choice in enumerate(("left", "right", "tie", "skip"), start=1):
            after = ana.answer(choice, seconds=2.0)
            lines = (tmp_path / "answers.jsonl").read_text().splitlines()
            assert (after["done"], len(lines)) == (done, done)  # on the disk before the next
        assert after["item"] is None
        assert [json.loads(line)["answer"] for line in lines] == ["left", "right", "tie", "skip"]
        status, content, _ = ana.ask("/undo", {"answered": 4})
        assert (status, json.loads(content)["done"]) == (200, 3)
        assert json.loads(content)["seconds_left"] == 2.0


def test_a_name_begins_a_session_of_its_own(look, tmp_path):
    with served(look, tmp_path) as (port, _):
        nobody = Client(port)
        assert b"Your name" in nobody.ask("/")[1]
        assert nobody.ask("/state")[0] == 401
        assert nobody.ask("/start", b"name=%20%20")[0] == 400
        status, _, headers = nobody.ask("/start", "name=Åsa+<b>".encode())
        assert (status, headers["location"]) == (303, "/")
        assert "HttpOnly" in headers["set-cookie"] and "SameSite=strict" in headers["set-cookie"]
        cookie = headers["set-cookie"].partition(";")[0]
        page = nobody.ask("/", Cookie=cookie)[1].decode()
        assert "Åsa &lt;b&gt;" in page
        assert "<b>" not in page
        assert nobody.ask("/leave", b"", Cookie=cookie)[0] == 303


def test_the_page_asks_nobody_else_for_anything(look, tmp_path):
    with served(look, tmp_path) as (port, _):
        ana = Client(port, "Ana")
        for path, kind in (("/", "text/html"), ("/label.css", "text/css"), ("/label.js", "text/j")):
            status, content, headers = ana.ask(path)
            assert (status, headers["content-type"].startswith(kind)) == (200, True)
            assert b"//" not in content.replace(b"\n//", b"").replace(b" // ", b"")
            assert "default-src 'none'" in headers["content-security-policy"]
        token = ana.state()["item"]["images"][0]
        status, content, headers = ana.ask(f"/image/{token}")
        assert (status, headers["content-type"], content[:4]) == (200, "image/png", b"\x89PNG")
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert ana.ask("/agreement")[1] == b"<p>agreement</p>"


@pytest.mark.parametrize(
    "path",
    [
        "/image/../answers.jsonl",
        "/image/%2e%2e%2fanswers.jsonl",
        "/image/..%2f..%2f..%2fetc%2fpasswd",
        "/image//etc/passwd",
        "/../../../etc/passwd",
        "/label.css/../session.py",
        "/templates/page.html",
        "/image/" + "0" * 32,
        "/image/images/base/p0-0.png",
    ],
)
def test_nothing_but_its_own_images_is_given_away(look, tmp_path, path):
    (tmp_path / "answers.jsonl").write_text("")
    with served(look, tmp_path) as (port, _):
        ana = Client(port, "Ana")
        ana.state()
        status, content, _ = ana.ask(path)
    assert status == 404
    assert content.strip() in (b"Not Found", b"There is no such image.")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another server of this machine
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_names_and_other_pages_are_refused(look, tmp_path, headers):
    with served(look, tmp_path) as (port, _):
        ana = Client(port, "Ana")
        item, image = ana.state()["item"]["token"], ana.state()["item"]["images"][0]
        sent = {"item": item, "answer": "left"}
        assert ana.ask("/answer", sent, **headers)[0] == 403
        assert ana.ask("/start", b"name=Eve", **headers)[0] == 403
        assert ana.ask(f"/image/{image}", **headers)[0] == 403
        assert ana.ask("/state", **headers)[0] == 403
        assert not (tmp_path / "answers.jsonl").exists()
        own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
        assert ana.ask("/answer", sent, **own)[0] == 200


def test_without_the_password_nothing_is_said(look, tmp_path):
    guard = Guard.of("127.0.0.1", password=PASSWORD)
    with served(look, tmp_path, guard=guard) as (port, session):
        token = session.state("Ana")["item"]["images"][0]
        stranger = Client(port, "Ana")
        for path in ("/", "/state", f"/image/{token}", "/agreement", "/label.js"):
            status, content, headers = stranger.ask(path)
            assert (status, "www-authenticate" in headers) == (401, True)
            assert len(content) < 200 and PASSWORD.encode() not in content
        assert stranger.ask("/answer", {"item": "x", "answer": "left"})[0] == 401
        wrong = {"Authorization": "Basic eDp3cm9uZyBwYXNzd29yZA=="}
        assert stranger.ask("/state", **wrong)[0] == 401
        right = {"Authorization": "Basic eDpjb3JyZWN0IGhvcnNl"}
        assert stranger.ask("/state", **right)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"no json",
        [],
        {"answer": "left"},
        {"item": "0" * 32, "answer": "left"},
        {"item": "OWN", "answer": "best"},
        {"item": "OWN", "answer": ["left"]},
        {"item": "OWN", "answer": "left", "seconds": "long"},
        {"item": "OWN", "answer": "left", "ranking": [[0], [1]]},
        {"item": "OWN", "answer": "ranking"},
        {"item": "OWN", "answer": "ranking", "ranking": [0, 1]},
        {"item": "OWN", "answer": "ranking", "ranking": [["0"], ["1"]]},
        b"[" * 60_000,
        b" " * 70_000,
    ],
)
def test_what_is_no_answer_is_refused_and_changes_nothing(look, tmp_path, sent):
    with served(look, tmp_path) as (port, _):
        ana = Client(port, "Ana")
        if isinstance(sent, dict) and sent.get("item") == "OWN":
            sent = {**sent, "item": ana.state()["item"]["token"]}
        status, content, _ = ana.ask("/answer", sent)
        assert status in (400, 409, 413), content
        assert ana.ask("/undo", {"answered": "1"})[0] == 400
        assert ana.state()["done"] == 0
        assert not (tmp_path / "answers.jsonl").exists()


def test_responses_are_text_and_no_markup(tmp_path):
    items = PairsOfResponses(ResponseConfig(path=str(responses(tmp_path / "rows"))))
    with served(items, tmp_path / "labels") as (port, _):
        ana = Client(port, "Ana")
        item = ana.state()["item"]
        assert item["turns"] == [{"role": "user", "text": "What is number 0?"}]
        assert set(item["responses"]) == {"a good answer <b>0</b>", "a bad answer 0"}
        assert ana.ask(f"/image/{item['images'][0]}")[0] == 200
        assert ana.answer("left")["done"] == 1
        assert b'data-shows="responses"' in ana.ask("/")[1]


def test_a_port_that_is_taken_is_told(look):
    taken = listen("127.0.0.1", 0)
    with taken, pytest.raises(ConfigError, match="cannot be listened at"):
        listen("127.0.0.1", taken.getsockname()[1])
