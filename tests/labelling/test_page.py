"""The page in a browser: keys, ranking, a server that goes away, and no request to elsewhere."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from diffalign.data.responses.config import ResponseConfig
from diffalign.labelling.answers import AnswerFile
from diffalign.labelling.sources import GeneratedImages, GroupsOfImages, PairsOfResponses
from tests.jobs.test_label import answers_there, free_port
from tests.labelling.builders import generated, grouped, responses, served
from tests.processes import started, wait_until
from tests.runs import SCRIPTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "t": "tie", "b": "both_bad", "s": "skip"}


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    opened = context.new_page()
    opened.set_default_timeout(300_000)
    opened.asked, opened.problems = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    yield opened
    context.close()


def begin(page, port):
    page.goto(f"http://127.0.0.1:{port}")
    page.fill("input[name=name]", "Ana")
    page.click("button.main")
    page.locator(".side").first.wait_for()


def counts(page, text):
    page.locator(".count", has_text=text).wait_for()


def test_two_hundred_answers_by_keyboard_over_a_kill(page, tmp_path):
    folder, output, log = (
        generated(tmp_path / "look", prompts=200),
        tmp_path / "out",
        tmp_path / "l",
    )
    port, rng, stack = free_port(), random.Random(7), []
    command = ["label", str(folder), f"output={output}", f"port={port}"]
    kill_at = rng.randrange(20, 180)
    with started(*command, log=log) as process:
        wait_until(lambda: answers_there(port), process, log)
        begin(page, port)
        while len(stack) < kill_at:
            step(page, rng, stack)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        page.keyboard.press("ArrowLeft")
        page.locator(".notice", has_text="does not answer").wait_for()
        page.keyboard.press("ArrowRight")  # one answer at a time: this one does not count
    stack.append("left")
    with started(*command, log=log) as process:
        counts(page, f"{len(stack)} of 200")  # by itself
        assert not page.locator(".notice").is_visible()
        while len(stack) < 200:
            step(page, rng, stack)
        page.locator(".over", has_text="That was everything").wait_for()
        page.keyboard.press("u")
        counts(page, "199 of 200")
        page.keyboard.press("b")
        page.locator(".over").wait_for()
        stack[-1] = "both_bad"
    own = AnswerFile(output).by_person["Ana"]
    assert [answer.answer for answer in own.values()] == stack
    assert len(own) == 200
    assert all(answer.seconds is not None for answer in own.values())
    assert {url.split("/")[2] for url in page.asked if not url.startswith("data:")} == {
        f"127.0.0.1:{port}"
    }
    assert not page.problems


def step(page, rng, stack):
    """One more answer, or one less."""
    if stack and rng.random() < 0.08:
        page.keyboard.press(rng.choice(["u", "Backspace", "Control+z"]))
        stack.pop()
    else:
        key = rng.choice(list(KEYS))
        page.keyboard.press(key)
        stack.append(KEYS[key])
    counts(page, f"{len(stack)} of 200")


def test_groups_are_ranked_by_number_and_click(page, tmp_path):
    items = GroupsOfImages(grouped(tmp_path / "groups", groups=2))
    with served(items, tmp_path) as (port, session):
        begin(page, port)
        page.keyboard.press("Enter")  # nothing to save yet
        page.keyboard.press("2")
        page.locator(".side").nth(3).click()
        page.keyboard.press("t")
        page.keyboard.press("1")
        assert page.locator(".place").all_text_contents() == ["=2.", "1.", "=2."]
        page.keyboard.press("Enter")
        counts(page, "1 of 2")
        (answer,) = session.standing()
        order = answer.order
        assert answer.ranking == ((order[1],), tuple(sorted((order[0], order[3]))))
        page.keyboard.press("s")
        page.locator(".over").wait_for()
    assert not page.problems


def test_responses_are_chosen_by_click(page, tmp_path):
    items = PairsOfResponses(ResponseConfig(path=str(responses(tmp_path / "rows"))))
    with served(items, tmp_path / "labels") as (port, session):
        (tmp_path / "labels").mkdir(exist_ok=True)
        begin(page, port)
        good = page.locator(".side", has_text="a good answer <b>0</b>")
        assert page.locator(".turn").all_text_contents() == ["What is number 0?"]
        assert page.locator(".context img").count() == 1
        good.click()
        counts(page, "1 of 3")
        (answer,) = session.standing()
        ((_, verdict),) = answer.verdicts()
        assert verdict == "first"
    assert not page.problems


def test_a_phone_shows_one_above_the_other_and_all_of_it(browser, tmp_path):
    items = GeneratedImages(generated(tmp_path / "look"))
    context = browser.new_context(
        viewport={"width": 390, "height": 780}, is_mobile=True, has_touch=True
    )
    with served(items, tmp_path / "labels") as (port, session):
        page = context.new_page()
        page.set_default_timeout(300_000)
        begin(page, port)
        boxes = [page.locator(".frame").nth(n).bounding_box() for n in range(2)]
        assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"] - 1
        buttons = page.locator(".keys.two").bounding_box()
        assert boxes[1]["y"] + boxes[1]["height"] <= buttons["y"]
        assert buttons["y"] + buttons["height"] <= 780
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator(".side").nth(1).tap()
        counts(page, "1 of 3")
        assert [answer.answer for answer in session.standing()] == ["right"]
    context.close()


def test_the_images_of_the_page_are_made_by_a_script(tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    command = [sys.executable, SCRIPTS / "screenshot_label.py", "--only", "phone"]
    made = subprocess.run(
        [*command, "--out", tmp_path, "--chromium", CHROMIUM], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "label-phone.png") as image:
        assert image.size == (390, 780)
