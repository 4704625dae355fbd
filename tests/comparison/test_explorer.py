"""All images on the page of a comparison: what is within it, and in a browser, what people do."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from diffalign import config
from diffalign.comparison import explorer
from diffalign.comparison.explorer import explorer_section
from diffalign.generation.manifest import read_manifest
from diffalign.jobs import compare, score
from diffalign.pages.parts import page_of
from tests.browser import opened
from tests.jobs.folders import fill

PROMPTS = ["a red fox", "a blue fox", "two <b>hens", "a red hat"]
LEVELS = {"base": (100, 100, 100, 100), "bright": (130, 90, 200, 100), "dark": (10, 60, 50, 99)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models, four prompts: gains of `bright` by rows are +30, -10, +100, 0 grey levels."""
    folder = tmp_path_factory.mktemp("images")
    levels = {
        (model, prompt, 0): level
        for model, of_model in LEVELS.items()
        for prompt, level in zip(PROMPTS, of_model, strict=True)
    }
    fill(folder, {key: level for key, level in levels.items() if key[:2] != ("dark", "a red hat")})
    overrides = [f"images={folder}", "scorer.kind=tests.comparison.brightness"]
    score.run(config.load(score.ScoreConfig, None, overrides))
    compare.run(config.load(compare.CompareConfig, None, [f"images={folder}", "resamples=100"]))
    return folder


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_the_page_has_every_image_score_and_the_place_of_the_file(folder):
    data = data_of((folder / "report.html").read_text())
    assert data["models"] == ["base", "bright", "dark"] and data["scorers"] == ["brightness"]
    assert [row["prompt"] for row in data["rows"]] == PROMPTS
    cell = data["rows"][0]["cells"][1]
    assert cell["image"].startswith("data:image/png;base64,")
    assert (folder / cell["file"]).is_file()
    assert cell["scores"] == [pytest.approx(130 / 255, abs=1e-4)]
    assert data["rows"][3]["cells"][2] == {"image": None, "file": None, "scores": [None]}


def test_a_prompt_cannot_leave_its_place_and_no_address_is_in_the_page(folder):
    page = (folder / "report.html").read_text()
    assert "<b>hens" not in page
    assert not re.search(r"https?:", page)
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', page)
    assert "default-src &#39;none&#39;" in policy and "script-src &#39;sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_of_many_images_the_first_seeds_are_within_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "SIDES", ((4, 300), (8, 200)))
    levels = {(m, p, s): 9 for m in ("a", "b") for p in ("p", "q", "r") for s in (0, 1)}
    rows = {row.key: row for row in read_manifest(fill(tmp_path, levels))}
    section = explorer_section(tmp_path, tmp_path / "page.html", rows, ["a", "b"], {})
    page = page_of("x", section)
    found = [(row["seed"], bool(row["cells"][0]["image"])) for row in data_of(page)["rows"]]
    assert found == [(0, True), (1, True), (0, True), (1, False), (0, True), (1, False)]
    assert "images of 2 further seeds are not within this page" in page
    assert all(cell["file"] for row in data_of(page)["rows"] for cell in row["cells"])


def test_large_images_are_reduced_the_more_the_more_there_are(tmp_path, monkeypatch):
    rows = {row.key: row for row in read_manifest(fill(tmp_path, {("a", "p", 0): 9}))}
    Image.effect_noise((600, 300), 90).save(tmp_path / rows["a", "p", 0].file)

    def length(most: int) -> int:
        monkeypatch.setattr(explorer, "SIDES", ((most, 400), (9, 150)))
        section = explorer_section(tmp_path, tmp_path / "page.html", rows, ["a"], {})
        return len(data_of(page_of("x", section))["rows"][0]["cells"][0]["image"])

    assert length(0) < length(1) / 3


def test_a_server_shows_files_and_no_thumbnails(folder):
    rows = {row.key: row for row in read_manifest(folder)}
    section = explorer_section(
        folder, folder / "x.html", rows, ["base", "bright"], {}, served="/file/images"
    )
    cell = data_of(page_of("x", section))["rows"][0]["cells"][0]
    assert cell["image"] is None
    assert cell["file"] == "/file/images/images/base/a-red-fox-0.png"


@pytest.mark.slow
@pytest.mark.parametrize("look", [{}, {"viewport": {"width": 390, "height": 800}}])
def test_people_filter_sort_and_compare_in_a_browser(folder, look):
    with opened((folder / "report.html").as_uri(), **look) as tab:
        tab.click("nav a:last-child")

        def prompts() -> list[str]:
            return tab.locator(".entry > .caption").all_text_contents()

        assert prompts() == PROMPTS
        tab.select_option("select[name=sort]", "difference")
        assert prompts() == ["two <b>hens", "a red fox", "a red hat", "a blue fox"]
        tab.click("button[name=direction]")
        assert prompts() == ["a blue fox", "a red hat", "a red fox", "two <b>hens"]
        tab.select_option("select[name=show]", "won")
        assert prompts() == ["a red fox", "two <b>hens"]
        tab.select_option("select[name=model]", label="dark")
        assert prompts() == []
        tab.select_option("select[name=show]", "all")
        tab.select_option("select[name=sort]", "score")
        assert prompts() == ["a red fox", "two <b>hens", "a blue fox", "a red hat"]
        tab.fill("input[type=search]", "RED")
        assert prompts() == ["a red fox", "a red hat"]
        assert tab.inner_text("[role=status]") == "2 of 4 prompts"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_the_slider_and_the_keys_work_in_a_browser(folder):
    with opened((folder / "report.html").as_uri(), color_scheme="dark") as tab:
        tab.click("nav a:last-child")
        tab.keyboard.press("j")
        tab.keyboard.press("j")
        tab.keyboard.press("Enter")
        viewer = tab.locator("dialog.viewer")
        assert viewer.locator(".prompt").inner_text() == "a blue fox"

        def seen() -> str:
            return tab.locator(".pair").evaluate("e => e.style.getPropertyValue('--seen')")

        assert seen() == "50%"
        tab.keyboard.press("d")
        assert seen() == "55%"
        tab.keyboard.press(" ")
        assert seen() == "0%"
        tab.keyboard.press("a")
        assert seen() == "0%"
        tab.keyboard.press("ArrowRight")
        assert viewer.locator(".prompt").inner_text() == "two <b>hens"
        assert "bright" in viewer.locator(".right figcaption").inner_text()
        tab.keyboard.press("2")
        assert "dark" in viewer.locator(".right figcaption").inner_text()
        tab.wait_for_timeout(300)  # the whole file takes the place of what is within the page
        source = viewer.locator(".right img").get_attribute("src")
        assert source == "images/dark/two-%3Cb%3Ehens-0.png"
        box = viewer.locator("input[type=range]").bounding_box()
        tab.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
        assert 20 < float(seen().rstrip("%")) < 30
        tab.keyboard.press("s")
        assert viewer.evaluate("e => e.classList.contains('side')")
        tab.keyboard.press("Escape")
        assert not viewer.is_visible()
        tab.keyboard.press("/")
        tab.keyboard.type("hat")
        assert tab.locator(".entry").count() == 1
