from __future__ import annotations

import base64

import pytest

from diffalign.errors import ConfigError
from diffalign.pages import guard as guards
from diffalign.pages.guard import PASSWORD_VARIABLE, Guard


@pytest.fixture(autouse=True)
def no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


def basic(password: str, user: str = "me") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:8000"},
        {"host": "localhost:9999"},  # through a tunnel from another port
        {"Host": "[::1]:8000"},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
        {"Host": "localhost:8000", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors"},
        {"Host": "localhost", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_this_machine_is_answered(headers):
    assert Guard.of("127.0.0.1").refusal(headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": ""},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.1.7:8000"},
        {"Host": "[broken"},
        {"Host": "user@evil.example"},
        {"Host": "localhost:8000", "Origin": "http://evil.example"},
        {"Host": "localhost:8000", "Origin": "http://localhost:9000"},
        {"Host": "localhost:8000", "Origin": "null"},
        {"Host": "localhost:8000", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Host": "localhost:8000", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
)
def test_pages_of_strangers_are_refused(headers):
    refusal = Guard.of("127.0.0.1").refusal(headers)
    assert refusal is not None and refusal.status == 403


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.7", "box.example"])
def test_an_address_that_others_reach_needs_a_password(address, monkeypatch):
    with pytest.raises(ConfigError, match=f"there is no password: .*{PASSWORD_VARIABLE}"):
        Guard.of(address)
    with pytest.raises(ConfigError, match="at least 8"):
        Guard.of(address, password="short")
    monkeypatch.setenv(PASSWORD_VARIABLE, "of the environment")
    guard = Guard.of(address)
    assert guard.password == "of the environment" and "environment" not in repr(guard)


def test_the_password_is_asked_for_and_compared_whole():
    guard = Guard.of("0.0.0.0", password="open: sesame")
    asked = {"Host": "192.168.1.7:8000"}
    refusal = guard.refusal(asked)
    assert refusal is not None and refusal.status == 401
    assert refusal.headers["WWW-Authenticate"].startswith("Basic ")
    assert guard.refusal({**asked, "Authorization": basic("open: sesame")}) is None
    for wrong in (basic("open"), basic(""), basic("open: sesame "), "Basic ?", "Bearer x", ""):
        refused = guard.refusal({**asked, "Authorization": wrong})
        assert refused is not None and refused.status == 401, wrong


def test_a_name_that_may_be_made_to_point_here_is_refused_even_with_the_password(monkeypatch):
    monkeypatch.setattr(guards.socket, "gethostname", lambda: "Box")
    guard = Guard.of("0.0.0.0", password="long enough")
    known = {"Authorization": basic("long enough")}
    assert guard.refusal({"Host": "box:8000", **known}) is None
    refusal = guard.refusal({"Host": "evil.example", **known})
    assert refusal is not None and refusal.status == 403


def test_a_page_of_another_site_is_refused_though_the_browser_sends_the_password():
    guard = Guard.of("0.0.0.0", password="long enough")
    asked = {"Host": "10.0.0.1", "Authorization": basic("long enough")}
    assert guard.refusal(asked) is None
    refusal = guard.refusal({**asked, "Origin": "http://evil.example"})
    assert refusal is not None and refusal.status == 403
