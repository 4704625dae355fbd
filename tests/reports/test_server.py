"""The studio: what it answers, what it refuses, and that it changes nothing."""

from __future__ import annotations

import base64
import http.client
import threading

import pytest

from diffalign.errors import ConfigError, DataError
from diffalign.jobs import studio as job
from diffalign.pages.guard import PASSWORD_VARIABLE, Guard
from diffalign.reports.server import Studio, server_of
from tests.browser import opened
from tests.jobs.folders import fill
from tests.reports.folders import add_previews, rows_of, run_at


@pytest.fixture(autouse=True)
def no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path):
    """Two runs, of which one has images, next to a secret."""
    (tmp_path / "secret.txt").write_text("secret")
    runs = tmp_path / "runs"
    one = run_at(runs / "one", rows_of(40), final=True)
    add_previews(one, ["a hat"], (0, 40), suffix=".png")
    fill(one / "evaluation", {(m, p, 0): 9 for m in ("base", "new") for p in ("a hat", "a hen")})
    (one / "evaluation" / "compare.json").write_text('{"comparisons": []}')
    (one / "evil.html").write_text("<script>steal()</script>")
    (one / ".holder.json").write_text("{}")
    run_at(runs / "sub" / "two", rows_of(20))
    (runs / "way-out.txt").symlink_to(tmp_path / "secret.txt")
    (runs / "sub" / "out").symlink_to(tmp_path, target_is_directory=True)
    outside = run_at(tmp_path / "outside", rows_of(20))
    fill(outside, {("base", "secret", 0): 9})
    return runs


def answer(folder, target: str):
    return Studio(folder).answer(target)


def text(folder, target: str) -> str:
    found = answer(folder, target)
    assert found.status == 200, target
    return found.content.decode()


def test_runs_are_listed_and_each_has_its_page(folder):
    page = text(folder, "/")
    assert 'href="/run/one"' in page and 'href="/run/sub/two"' in page
    assert "40 of 40" in page and "stopped" in page
    of_run = text(folder, "/run/one")
    assert 'src="/file/one/previews/step-00000040-0.png"' in of_run
    assert "data:image" not in of_run
    assert 'href="/images/one/evaluation"' in of_run


def test_accuracies_of_the_terms_of_a_sum_are_listed(tmp_path):
    run_at(tmp_path / "one", [{"step": 10, "loss": 0.6, "dpo/accuracy": 0.875}])
    assert "88%" in text(tmp_path, "/")


def test_two_runs_are_held_side_by_side(folder):
    page = text(folder, "/compare?run=one&run=sub/two")
    assert "one and two" in page
    assert answer(folder, "/compare?run=one").status == 400


def test_images_of_a_comparison_are_asked_for_as_they_are_seen(folder):
    page = text(folder, "/images/one/evaluation")
    assert "/file/one/evaluation/images/base/a-hat-0.png" in page
    found = answer(folder, "/file/one/evaluation/images/base/a-hat-0.png")
    assert (found.status, found.kind) == (200, "image/png")


def test_a_run_may_be_the_folder_itself(folder):
    assert 'href="/run/."' in text(folder / "one", "/")
    assert "40 of 40" in text(folder / "one", "/run/.")


@pytest.mark.parametrize(
    "target",
    [
        "/file/../secret.txt",
        "/file/%2e%2e/secret.txt",
        "/file/one/..%2f..%2f..%2fsecret.txt",
        "/file//etc/passwd",
        "/file/way-out.txt",
        "/file/sub/out/secret.txt",
        "/run/../outside",
        "/run/%2e%2e/outside",
        "/run/sub/out/outside",
        "/images/../outside",
        "/images/sub/out/outside",
        "/compare?run=one&run=../outside",
        "/compare?run=one&run=sub/out/outside",
        "/file/one/%00",
        "/file/one/evil.html",
        "/file/one/.holder.json",
        "/file/one",
        "/file/",
        "/run/..",
        "/run/one/final",
        "/images/one",
        "/images/..",
        "/nothing",
        "/one/evil.html",
    ],
)
def test_what_is_not_meant_to_be_seen_is_not_sent(folder, target):
    found = answer(folder, target)
    assert found.status in (403, 404)
    assert found.content != b"secret" and b"steal" not in found.content
    assert b"root:" not in found.content


def test_an_absolute_name_is_not_sent(folder, tmp_path):
    for route in ("file", "run", "images"):
        assert answer(folder, f"/{route}/{tmp_path / 'outside'}").status == 404
    assert answer(folder, f"/file/{tmp_path / 'secret.txt'}").status == 404


@pytest.fixture
def served(folder):
    server = server_of(Studio(folder), Guard.of("127.0.0.1"), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, target: str = "/", method: str = "GET", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, target, headers={k.replace("_", "-"): v for k, v in headers.items()})
    found = connection.getresponse()
    return found, found.read().decode(errors="replace")


def test_strangers_and_everything_but_reading_are_refused(served):
    assert ask(served)[0].status == 200
    assert ask(served, Host="evil.example")[0].status == 403
    assert ask(served, Origin="http://evil.example")[0].status == 403
    for method in ("POST", "PUT", "DELETE"):
        assert ask(served, method=method)[0].status == 501
    found, said = ask(served, "/run/one", method="HEAD")
    assert found.status == 200 and said == ""
    assert found.headers["X-Frame-Options"] == "DENY"
    assert found.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_password_is_asked_for_where_one_is_set(folder):
    server = server_of(Studio(folder), Guard.of("127.0.0.1", password="long enough"), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        found, said = ask(server.server_address[1])
        assert found.status == 401 and "one" not in said
        known = "Basic " + base64.b64encode(b"me:long enough").decode()
        assert ask(server.server_address[1], Authorization=known)[0].status == 200
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_refuses_open_addresses_and_absent_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        job.run(folder, address="0.0.0.0", port=0)
    with pytest.raises(DataError, match="there is no such folder"):
        job.run(tmp_path / "nowhere")


@pytest.mark.slow
def test_runs_are_browsed_and_held_side_by_side_in_a_browser(served, folder):
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    with opened(f"http://127.0.0.1:{served}/") as tab:
        tab.click("a:has-text('one')")
        image = tab.locator(".frames td img").first
        image.scroll_into_view_if_needed()
        image.evaluate("i => i.decode()")
        tab.click("a:has-text('All images')")
        tab.locator(".entry img").first.click()
        assert tab.locator("dialog.viewer .prompt").inner_text() == "a hat"
        shown = tab.locator("dialog.viewer .right img")
        shown.evaluate("i => i.decode()")
        assert shown.evaluate("i => i.naturalWidth") == 16
        tab.keyboard.press("Escape")
        tab.click("text=All runs")
        for box in tab.locator("input[type=checkbox]").all():
            box.check()
        tab.click("button:has-text('Side by side')")
        assert tab.inner_text("h1") == "one and two"
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
