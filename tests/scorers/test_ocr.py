from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.playground.text_images import WORDS, prompt_of, reader, render_word
from diffalign.scorers import ocr
from diffalign.scorers.ocr import OCR, similarity


@pytest.mark.parametrize(
    ("found", "wanted", "only", "expected"),
    [
        ("bat", "bat", False, 1.0),
        ("bau", "bat", False, 2 / 3),  # one letter replaced
        ("at", "bat", False, 2 / 3),  # one missing
        ("tab", "bat", False, 1 / 3),  # two replaced
        ("", "bat", False, 0.0),
        ("a long sentence", "bat", False, 0.0),  # more edits than letters: no less than nothing
        ("abatb", "bat", False, 1.0),  # text around it is free
        ("abatb", "bat", True, 1 / 3),  # or costs an edit a letter
        ("babt", "bat", False, 2 / 3),  # in pieces it is not there
    ],
)
def test_values_worked_by_hand(found, wanted, only, expected):
    assert similarity(found, wanted, only=only) == pytest.approx(expected)


def edits(first: str, second: str) -> int:
    """Edit distance by its definition."""

    @functools.cache
    def of(i: int, j: int) -> int:
        if 0 in (i, j):
            return i + j
        same = of(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(same, of(i - 1, j) + 1, of(i, j - 1) + 1)

    return of(len(first), len(second))


def test_it_is_the_reward_of_flow_grpo_on_any_text():
    chance, rewards = np.random.default_rng(0), set()
    for _ in range(300):
        found, wanted = ("".join(chance.choice(list("abc"), size=n)) for n in (5, 4))
        found, wanted = found[: chance.integers(6)], wanted[: 1 + chance.integers(4)]
        distance = 0 if wanted in found else min(edits(found, wanted), len(wanted))
        rewards.add(similarity(found, wanted, only=False))
        assert similarity(found, wanted, only=False) == pytest.approx(1 - distance / len(wanted))
    assert len(rewards) > 5


@pytest.mark.parametrize(
    ("prompt", "settings", "expected"),
    [
        ('a sign that says "Stop"', {}, "stop"),
        ("a sign that says “No entry”", {}, "noentry"),
        ('"EXIT" over "7 B"', {}, "exit7b"),
        ('"EXIT" over "7 B"', {"ignore_case": False, "ignore_spaces": False}, "EXIT 7 B"),
        ("a sign, text: Stop", {"wanted": "text: (.+)"}, "stop"),
        ("says stop or go", {"wanted": "(?:says|or) ([a-z]+)"}, "stopgo"),
    ],
)
def test_the_wanted_text_is_what_the_prompt_quotes(prompt, settings, expected):
    assert OCR(**settings).wanted_text(prompt) == expected


@pytest.mark.parametrize("prompt", ["a sign", 'a "" sign', 'a " " sign', 'half a "quote', ""])
def test_a_prompt_without_quoted_text_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match="asks for no text: the scorer ocr looks for") as refusal:
        OCR().score(torch.zeros(1, 3, 8, 8), [prompt])
    assert repr(prompt) in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wanted": "says (.+"}, "wanted must be a regular expression, got 'says"),
        ({"wanted": "says .+"}, "must have one group, .* has 0"),
        ({"wanted": "(says|reads) (.+)"}, r"must have one group, .* has 2: write \(\?:"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"enlarge": 0}, "enlarge must be at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OCR(**settings)


def test_packages_that_are_missing_are_named_before_anything_loads(monkeypatch):
    monkeypatch.setattr(ocr, "_PACKAGES", ("torch", "no_such_reader"))
    with pytest.raises(ValueError, match=r"needs no_such_reader, .*'diffalign\[ocr\]'"):
        OCR()


def test_a_wheel_without_its_models_is_refused_and_nothing_is_downloaded(monkeypatch, tmp_path):
    (tmp_path / "rapidocr").mkdir()
    (tmp_path / "rapidocr/__init__.py").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "rapidocr/__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match=r"does not hold PP-OCRv6_det_small\.onnx and"):
        OCR().score(torch.zeros(1, 3, 8, 8), [prompt_of("BAT")])


def told(*lines: str, **settings) -> OCR:
    """A scorer whose recogniser reads these lines in every image."""
    scorer = OCR(**settings)
    vars(scorer)["_reader"] = lambda pixels: SimpleNamespace(txts=lines or None)
    return scorer


@pytest.mark.parametrize(
    ("lines", "settings", "expected"),
    [
        (["BAT"], {}, 1.0),
        (["B A", "T"], {}, 1.0),
        (["BAU"], {}, 2 / 3),
        (["BAU"], {"measure": "exact"}, 0.0),
        (["bat"], {"measure": "exact"}, 1.0),
        (["bat"], {"measure": "exact", "ignore_case": False}, 0.0),
        (["B AT"], {"measure": "exact", "ignore_spaces": False}, 0.0),
        (["A BAT."], {"measure": "exact"}, 1.0),
        (["A BAT."], {"measure": "exact", "only": True}, 0.0),
        ([], {}, 0.0),
        ([], {"measure": "exact"}, 0.0),
    ],
)
def test_what_is_read_is_compared_by_the_settings(lines, settings, expected):
    scores = told(*lines, **settings).score(torch.zeros(2, 3, 8, 8), [prompt_of("BAT")] * 2)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([expected] * 2)


def test_the_recogniser_sees_blue_first_and_as_large_as_asked():
    scorer, seen = told("BAT", enlarge=3), []
    vars(scorer)["_reader"] = lambda pixels: seen.append(pixels) or SimpleNamespace(txts=None)
    scorer.read(Image.new("RGB", (8, 6), (255, 0, 10)))
    assert seen[0].shape == (18, 24, 3)
    assert seen[0][0, 0].tolist() == [10, 0, 255]


def test_every_setting_that_changes_scores_has_its_own_fingerprint():
    settings = [
        *({}, {"measure": "exact"}, {"only": True}, {"wanted": "says (.+)"}),
        *({"ignore_case": False}, {"ignore_spaces": False}, {"lines": "whole"}, {"enlarge": 2}),
        *({"shortest_side": 320},),
    ]
    assert len({OCR(**each).fingerprint for each in settings}) == len(settings)
    assert OCR(threads=2).fingerprint == OCR().fingerprint


def images_of(words) -> torch.Tensor:
    """Shape [n, 3, 64, 64]."""
    drawn = [np.array(render_word(word, np.random.default_rng(i))) for i, word in enumerate(words)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"lines": "whole"}, {"lines": "found", "enlarge": 4}])
def test_rapidocr_reads_small_words(settings):
    words = WORDS[:8]
    scorer = OCR(measure="exact", only=True, **settings)
    assert scorer.score(images_of(words), [prompt_of(word) for word in words]).tolist() == [1.0] * 8
    others = [prompt_of(word) for word in (*words[1:], words[0])]
    assert scorer.score(images_of(words), others).tolist() == [0.0] * 8


@pytest.mark.slow
def test_rapidocr_reads_each_image_the_same_whatever_is_next_to_it_and_by_any_threads():
    words = ["BAT", "BAU", "AAT", "NUT"]
    images, prompts = images_of(words), [prompt_of("BAT")] * 4
    together = reader().score(images, prompts)
    assert together.tolist() == pytest.approx([1.0, 2 / 3, 2 / 3, 1 / 3])
    alone = [reader().score(images[i : i + 1], prompts[:1]).item() for i in range(4)]
    assert together.tolist() == alone
    several = OCR(only=True, lines="whole", enlarge=2, threads=64)
    assert torch.equal(several.score(images, prompts), together)
    assert reader().score(torch.zeros(1, 3, 64, 64), prompts[:1]).tolist() == [0.0]


@pytest.mark.slow
def test_rapidocr_reads_lines_from_top_to_bottom():
    image = Image.new("RGB", (512, 512), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=80)
    pen.text((60, 60), "NO ENTRY", font=font, fill="black")
    pen.text((60, 320), "EXIT", font=font, fill="navy")
    assert OCR(threads=2).read(image).split() in (["NO", "ENTRY", "EXIT"], ["NOENTRY", "EXIT"])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    assert to_images(pixels)[0].tobytes() == image.tobytes()
    asked = ['a door with "No entry" over "Exit"', 'a door that says "entry"']
    assert OCR().score(pixels.expand(2, -1, -1, -1), asked).tolist() == [1.0, 1.0]
