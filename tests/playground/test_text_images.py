"""The world of text, and that what is shipped of it is what its description says."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.errors import ModelError
from diffalign.playground import models
from diffalign.playground.models import build_tokenizer, playground_text_path
from diffalign.playground.text_images import (
    HELD_OUT_WORDS,
    LETTERS,
    WORDS,
    misspell,
    paint,
    prompt_of,
    reader,
    render_word,
)


def test_words_have_three_letters_of_the_alphabet_and_occur_once():
    words = (*WORDS, *HELD_OUT_WORDS)
    assert len(set(words)) == len(words) == 32
    assert all(len(word) == 3 and set(word) <= set(LETTERS) for word in words)


def test_a_misspelling_replaces_one_letter_by_a_neighbour():
    chance = np.random.default_rng(0)
    found = {misspell("BAT", chance) for _ in range(200)}
    # LETTERS is ...A B E... and ...R T U, and U and A are neighbours.
    assert found == {"AAT", "EAT", "BUT", "BBT", "BAR", "BAU"}


def test_a_sign_painter_is_as_careless_as_asked():
    chance = np.random.default_rng(0)
    assert {paint("BAT", chance, mistakes=0.0) for _ in range(50)} == {"BAT"}
    right = np.mean([paint("BAT", chance, mistakes=0.6) == "BAT" for _ in range(4000)])
    assert 0.4 < right < 0.46  # 0.4, and what a second mistake undoes of a first


def test_an_image_is_a_dark_word_in_the_middle_of_a_light_ground():
    image = np.asarray(render_word("HUB", np.random.default_rng(3)), dtype=int)
    assert image.shape == (64, 64, 3)
    rows, columns = np.nonzero((image < 100).all(axis=2))
    assert abs((rows.min() + rows.max()) / 2 - 32) < 4
    assert abs((columns.min() + columns.max()) / 2 - 32) < 4
    assert 15 <= np.ptp(rows) + 1 <= 21 and (image[:10] >= 230).all()
    again = render_word("HUB", np.random.default_rng(3))
    assert np.array_equal(image, np.asarray(again))
    assert not np.array_equal(image, np.asarray(render_word("HUB", np.random.default_rng(4))))


def test_the_tokenizer_spells_the_word_of_a_prompt():
    tokens = build_tokenizer(pad_token="!").tokenize(prompt_of("BAT"))
    assert tokens == ["a</w>", "black</w>", '"</w>', "b", "a", "t</w>", '"</w>']


def test_a_world_that_is_not_there_is_missed_by_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_assets", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"scripts/make_text_world\.py --out"):
        playground_text_path()


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(playground_text_path() / "preferences/train.parquet").to_pylist()


def test_prompts_and_pairs_are_about_the_words_and_no_other(rows):
    prompts = (playground_text_path() / "prompts.txt").read_text().splitlines()
    assert prompts == [prompt_of(word) for word in WORDS]
    assert {row["caption"] for row in rows} == set(prompts)
    labels = [row["label_0"] for row in rows]
    assert set(labels) <= {0.0, 0.5, 1.0}
    assert len(labels) - labels.count(0.5) >= 500


def test_the_world_is_small():
    files = [path for path in playground_text_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} == {".safetensors", ".parquet", ".json", ".md", ".txt"}


@pytest.mark.slow
def test_labels_are_what_is_read_in_the_stored_bytes(rows):
    for row in rows[:40]:
        images = [Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1")]
        first, second = reader().score_images(images, [row["caption"]] * 2).tolist()
        expected = 1.0 if first > second else 0.0 if first < second else 0.5
        assert (row["label_0"], row["label_1"]) == (expected, 1 - expected)
