from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from diffalign.imaging.grid import GridCell, GridRow
from diffalign.imaging.image_files import data_uri
from diffalign.pages.parts import (
    Html,
    Section,
    Tile,
    command,
    image_cards,
    image_grid,
    interval_bar,
    notes,
    paragraph,
    settings_list,
    share_bar,
    table,
    tiles,
    write_report,
)

LINKING = {"src", "href", "srcset", "data", "action"}
NASTY = '<script>alert("&")</script>'


def all_parts(text: str) -> list[Html]:
    row = GridRow(caption=text, note=text, cells=[GridCell(image=Image.new("RGB", (8, 8))), None])
    return [
        paragraph(text),
        notes([text]),
        command(text),
        settings_list({text: text}),
        tiles([Tile(text, text, text)]),
        table([text], [[text]]),
        share_bar({text: 1}),
        image_grid([row], [text, text]),
        image_cards([row], [text, text]),
    ]


class Tags(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    parts = [*all_parts(NASTY), interval_bar(0.7, 0.6, 0.8)]
    write_report(path, NASTY, Section(NASTY, *parts), lead=NASTY)
    return path.read_text(encoding="utf-8")


def test_every_text_is_escaped_and_every_tag_closed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in [tag for tag, _ in tags.seen]
    assert page.count("&lt;script&gt;") == page.count("alert")


def test_the_page_asks_nobody_for_anything(page):
    tags = Tags()
    tags.feed(page)
    links = [value for _, attrs in tags.seen for key, value in attrs.items() if key in LINKING]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?:|@import|url\(", page)


def test_a_browser_is_told_to_fetch_and_run_nothing(page):
    tags = Tags()
    tags.feed(page)
    metas = [attrs for tag, attrs in tags.seen if tag == "meta"]
    policies = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.split(None, 1) for rule in policies[0].split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert "script-src" not in rules
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_small_images_are_embedded_exactly_and_large_ones_reduced():
    def opened(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small = Image.effect_noise((64, 64), 90).convert("RGB")
    assert opened(data_uri(small)).tobytes() == small.tobytes()
    large = opened(data_uri(Image.new("RGB", (1024, 512))))
    assert (large.format, large.size) == ("JPEG", (448, 224))


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(0.55, 0.8, "gain"), (0.1, 0.45, "loss"), (0.4, 0.6, "open")]
)
def test_an_interval_bar_says_on_which_side_it_lies(low, high, kind):
    assert f'class="interval {kind}"' in interval_bar((low + high) / 2, low, high)


def test_an_interval_bar_is_generated_to_scale():
    bar = interval_bar(0.75, 0.5, 1.0)
    axis, neutral, spread = re.findall(r'x1="([\d.]+)" x2="([\d.]+)"', bar)
    start, end = map(float, axis)
    assert float(neutral[0]) == pytest.approx((start + end) / 2)
    assert tuple(map(float, spread)) == pytest.approx(((start + end) / 2, end))
    assert f'cx="{start + 0.75 * (end - start)}"' in bar


def test_no_warnings_make_no_box():
    assert notes([]) == ""


def test_scores_that_decide_a_pair_are_told_apart():
    cells = [GridCell(image=Image.new("RGB", (8, 8)), score=score) for score in (-2.264, -2.258)]
    page = image_grid([GridRow(caption="a", cells=cells)], ["base", "aligned"])
    assert "-2.264" in str(page) and "-2.258" in str(page)
