"""Planted defects are found exactly, and a data set without any has no finding."""

from __future__ import annotations

import json
import random

import pytest

from diffalign.checking.checks.base import Finding
from diffalign.data.decoding import decode
from diffalign.jobs import check
from tests.checking.planted import clean_rows, jpeg, noise_image, png, write
from tests.layouts import WRITERS, Pair


@pytest.fixture
def found(tmp_path):
    """Runs a check of a folder, in this process, and gives its findings by name."""

    def run(data, *overrides: str) -> dict[str, Finding]:
        config = check.load(str(data), ["workers=0", f"output={tmp_path / 'out'}", *overrides])
        return {finding.name: finding for finding in check.run(config).findings}

    return run


def names(*numbers: int) -> list[str]:
    return [f"row-{number:08d}" for number in numbers]


def clean_pairs(count: int) -> list[Pair]:
    return [
        Pair(png(noise_image(2 * n)), png(noise_image(2 * n + 1)), f"thing number {n}")
        for n in range(count)
    ]


@pytest.mark.parametrize("layout", WRITERS)
def test_nothing_is_found_in_a_clean_data_set_of_any_layout(layout, tmp_path, found):
    assert found(WRITERS[layout](tmp_path / "data", clean_pairs(40))) == {}


def test_all_defects_at_once(tmp_path, found):
    rows = clean_rows(200)
    rows += [dict(rows[number]) for number in range(10, 15)]
    for number in range(20, 24):
        rows[number]["jpg_1"] = rows[number]["jpg_0"]
    rows[30]["jpg_0"] = rows[30]["jpg_0"][:500]
    rows[33]["jpg_1"] = b"<html>404</html>"
    for row in rows[100:140]:
        row["label_0"], row["label_1"] = 1.0, 0.0
    write(tmp_path / "data", rows)
    leaked = [{**row, "caption": row["caption"].upper() + " !"} for row in rows[70:73]]
    write(tmp_path / "data", [*clean_rows(5, first=500), *leaked], split="test")
    result = found(tmp_path / "data")
    assert {name: finding.count for name, finding in result.items()} == {
        "repeated_rows": 5,
        "identical_sides": 4,
        "broken_images": 2,
        "shared_prompts": 3,
        "position_bias": 123,
    }
    assert result["repeated_rows"].rows == names(*range(200, 205))
    assert result["identical_sides"].rows == names(20, 21, 22, 23)
    assert result["broken_images"].rows == [f"{names(30)[0]} chosen", f"{names(33)[0]} chosen"]
    assert result["shared_prompts"].rows == names(70, 71, 72)
    assert all(finding.severity == "harmful" for finding in result.values())


@pytest.mark.parametrize(("won", "of", "biased"), [(120, 200, True), (102, 200, False)])
def test_a_position_bias_is_one_that_chance_does_not_explain(won, of, biased, tmp_path, found):
    rows = clean_rows(of)
    random.Random(0).shuffle(rows)
    for number, row in enumerate(rows):
        row["label_0"], row["label_1"] = float(number < won), float(number >= won)
    result = found(write(tmp_path / "data", rows), "without=[models]")
    assert list(result) == ["position_bias"] * biased
    if biased:
        assert "won in 60.0 % (52.9 to 66.8 %) of 200" in result["position_bias"].sentence


def test_two_broken_files_are_found_without_decoding(tmp_path, found, monkeypatch):
    rows = clean_rows(40)
    rows[7]["jpg_0"] = rows[7]["jpg_0"][:-80]
    rows[9]["jpg_1"] = png(noise_image(1000))[:-400]
    asked = []
    monkeypatch.setattr(
        "diffalign.checking.reading.decode",
        lambda c, **given: asked.append(c) or decode(c, **given),
    )
    result = found(write(tmp_path / "data", rows), "images=none")
    assert result["broken_images"].count == 2 and list(result) == ["broken_images"]
    assert "(1 truncated image, 1 corrupt image)" in result["broken_images"].sentence
    assert asked == [rows[7]["jpg_0"]]  # the PNG showed it when it was asked for its orientation


def test_damage_within_a_file_is_found_where_it_is_decoded(tmp_path, found):
    rows = clean_rows(40)
    content = bytearray(png(noise_image(1000)))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    rows[5]["jpg_0"] = bytes(content)
    data = write(tmp_path / "data", rows)
    assert found(data, "images=none") == {}
    assert found(data, "images=all")["broken_images"].count == 1


def test_copies_saved_anew_are_near_duplicates(tmp_path, found):
    rows = clean_rows(40, pixels=64)
    for place, other in ((3, 10), (4, 11), (5, 12)):
        rows[place]["jpg_1"] = jpeg(noise_image(2 * other, pixels=64), quality=50)
    rows[6]["jpg_0"] = jpeg(noise_image(26, pixels=128), quality=80)
    rows[20]["jpg_1"] = jpeg(noise_image(40, pixels=64), quality=60)
    result = found(write(tmp_path / "data", rows), "without=[sizes]")
    assert {name: finding.count for name, finding in result.items()} == {
        "near_duplicates": 4,
        "similar_sides": 1,
    }
    assert result["near_duplicates"].rows == names(10, 11, 12, 13)
    assert result["similar_sides"].rows == names(20)


def test_an_image_under_another_prompt(tmp_path, found):
    rows = clean_rows(40)
    for place in range(5):
        rows[20 + place]["jpg_1"] = rows[place]["jpg_0"]
    result = found(write(tmp_path / "data", rows))
    assert list(result) == ["images_of_other_prompts"]
    assert result["images_of_other_prompts"].count == 5
    assert result["images_of_other_prompts"].rows == names(20, 21, 22, 23, 24)


def test_an_image_in_several_pairs_of_its_prompt_is_none(tmp_path, found):
    rows = clean_rows(40)
    rows[21] |= {"caption": rows[20]["caption"], "jpg_0": rows[20]["jpg_0"]}
    assert found(write(tmp_path / "data", rows)) == {}


def test_opposite_labels_on_a_pair(tmp_path, found):
    rows = clean_rows(40)
    row = dict(rows[3], label_0=1.0 - rows[3]["label_0"], label_1=1.0 - rows[3]["label_1"])
    result = found(write(tmp_path / "data", [*rows, row]))
    assert list(result) == ["opposite_labels"]
    assert result["opposite_labels"].rows == names(3, 40)


def test_labels_of_two_people_are_no_repetition(tmp_path, found):
    rows = [{**row, "user_id": 1} for row in clean_rows(40)]
    again = [{**row, "user_id": 2} for row in rows[:6]]
    again[0] |= {"label_0": 1.0 - again[0]["label_0"], "label_1": 1.0 - again[0]["label_1"]}
    assert found(write(tmp_path / "data", [*rows, *again])) == {}


def test_a_clean_data_set_ends_with_a_page_and_figures(tmp_path, found):
    assert found(write(tmp_path / "data", clean_rows(40))) == {}
    written = json.loads((tmp_path / "out/check.json").read_text())
    assert written["verdict"] == "Nothing was found in 40 rows."
    assert written["checks"]["rows"]["figures"]["with a preference"] == 40
    assert (tmp_path / "out/report.html").is_file()
