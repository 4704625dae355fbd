"""The page of a diagnosis: words and their heat, images, and figures of displacement by content."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from diffalign.reports.diagnosis import (
    DiagnosedPair,
    DiagnosedResponse,
    Word,
    diagnosis_page,
    heat_image,
    heat_scale,
    token_texts,
    words_of,
)


def response(name: str, *ratios: tuple[str, float], looked=None) -> DiagnosedResponse:
    words = [Word(text, policy=-1 + ratio, reference=-1) for text, ratio in ratios]
    return DiagnosedResponse(name=name, words=words, looked_at=looked)


def pair(chosen: float, rejected: float, **more) -> DiagnosedPair:
    return DiagnosedPair(
        sample_id="row-1",
        prompt="What is <there>?",
        image=Image.new("RGB", (8, 8), (200, 10, 10)),
        responses=[
            response("chosen", ("A", chosen), (" dog.", 0.0), ("", 0.0), **more),
            response("rejected", ("A", rejected)),
        ],
    )


def test_words_have_their_heat_and_figures_and_text_is_escaped():
    page = diagnosis_page("x", [pair(2.0, -0.5)])
    spans = re.findall(
        r'<span class="(\w+)" style="--heat: ([\d.]+)" title="([^"]*)">([^<]*)<', page
    )
    assert [(kind, text) for kind, _, _, text in spans] == [
        ("rise", "A"),
        ("rise", "dog."),
        ("rise", "(end)"),
        ("fall", "A"),
    ]
    bare = re.sub(r"<[^>]*>", "", page)  # the space between words is there, without a colour
    assert "A dog. (end)" in bare
    assert float(spans[0][1]) == 1 > float(spans[3][1]) > float(spans[1][1]) == 0
    assert spans[0][2] == "+2.000 nats: -1.000 before, 1.000 now"
    assert "What is &lt;there&gt;?" in page


def test_tokens_of_one_word_are_put_together():
    policy, reference = [-1.0, -2, -3, -4], [0.0, -1, -1, -1]
    words = words_of(["A", " d", "og", ""], policy, reference)
    assert [(w.text, w.policy, w.reference) for w in words] == [
        ("A", -1, 0),
        (" dog", -5, -2),
        ("", -4, -1),
    ]


def test_what_stands_between_tokens_belongs_to_the_next():
    assert token_texts("A  dog.", [[0, 1], [3, 6], [6, 7], [7, 7]]) == ["A", "  dog", ".", ""]


def test_displacement_is_counted_by_pair():
    """The reference values: one of three chosen fell, one rejected did, and none is displaced."""
    page = diagnosis_page("x", [pair(0.5, -0.3), pair(-0.2, 0.2), pair(1.0, 0.9)])
    assert "1 of 3 less probable than before" in page
    assert "0 of 3" in page.partition("pairs displaced")[2][:200]
    page = diagnosis_page("x", [pair(-0.5, -3.0), pair(0.1, -1.0)])
    assert "1 of 2" in page.partition("pairs displaced")[2][:200]


def test_nothing_leaves_the_page_and_images_lie_within():
    looked = np.array([[0.0, 1.0], [0.5, 0.0]])
    page = diagnosis_page("x", [pair(1.0, -1.0, looked=looked)])
    assert page.count('src="data:image/') == 2
    assert "looked at for chosen" in page and "looked at for rejected" not in page
    assert "://" not in page and "<script" not in page


def test_an_image_is_bright_where_the_model_looked():
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    shown = np.asarray(heat_image(image, np.array([[0.0, 1.0], [0.0, 0.0]])), float)
    height, width, _ = shown.shape
    assert shown[: height // 4, -width // 4 :].mean() > 200 > 60 > shown[-height // 4 :].mean()
    dark = np.asarray(heat_image(image, np.zeros((2, 2))), float)
    assert dark.max() < 60


@pytest.mark.parametrize(("ratios", "scale"), [([0.0], 1e-3), ([2.0, -2.0], 2.0)])
def test_the_full_colour_is_that_of_large_words_and_never_of_none(ratios, scale):
    responses = [response("chosen", *(("a", ratio) for ratio in ratios))]
    found = DiagnosedPair(sample_id="1", prompt="", image=None, responses=responses)
    assert heat_scale([found]) == scale
