import shutil

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.errors import DataError
from tests.data.conftest import open_source
from tests.layouts import make_pairs, write_folder


def pairs_in(folder, **settings):
    data = open_data(PairConfig(path=str(folder), resolution=8, **settings))
    return list(data.pairs())


def test_sides_and_caption_are_found_by_name(tmp_path):
    first = pairs_in(write_folder(tmp_path, make_pairs(3)))[0]
    assert first.sample_id == "0000"
    assert first.prompt == "a red thing, number 0"
    assert (first.chosen, first.rejected) == (tmp_path / "win/0000.png", tmp_path / "lose/0000.png")


def test_the_folders_may_be_called_chosen_and_rejected(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "win").rename(tmp_path / "chosen")
    (tmp_path / "lose").rename(tmp_path / "rejected")
    assert pairs_in(tmp_path)[0].chosen == tmp_path / "chosen" / "0000.png"


@pytest.mark.parametrize("name", ["win", "chosen"])
def test_preferred_images_may_be_alone(name, tmp_path):
    write_folder(tmp_path, make_pairs(2))
    shutil.rmtree(tmp_path / "lose")
    (tmp_path / "win").rename(tmp_path / name)
    pair = pairs_in(tmp_path)[1]
    assert (pair.chosen, pair.rejected) == (tmp_path / name / "0001.png", None)
    assert pair.prompt == "a red thing, number 1"


@pytest.mark.parametrize("place", ["captions", "."])
def test_captions_may_lie_in_a_folder_of_their_own_or_next_to_the_two(place, tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "win" / "0000.txt").rename(tmp_path / place / "0000.txt")
    assert pairs_in(tmp_path)[0].prompt == "a red thing, number 0"


def test_the_two_sides_may_be_of_different_types(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "lose" / "0000.png").rename(tmp_path / "lose" / "0000.webp")
    assert pairs_in(tmp_path)[0].rejected == tmp_path / "lose" / "0000.webp"


def test_a_name_on_one_side_only_is_a_pair_without_an_image(tmp_path):
    write_folder(tmp_path, make_pairs(2))
    (tmp_path / "win" / "0000.png").unlink()
    (tmp_path / "lose" / "0001.png").unlink()
    assert [pair.chosen is None for pair in pairs_in(tmp_path)] == [True, False]
    assert [pair.rejected is None for pair in pairs_in(tmp_path)] == [False, True]


def test_a_missing_caption_file_is_an_empty_caption(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "win" / "0000.txt").unlink()
    assert pairs_in(tmp_path)[0].prompt == ""


def test_two_files_of_one_name_are_refused(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "win" / "0000.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds 0000.jpg and 0000.png: a pair is known by"):
        pairs_in(tmp_path)


def test_folders_that_say_who_won_cannot_be_reversed(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    with pytest.raises(DataError, match="preferred is win in every row"):
        pairs_in(tmp_path, labels="lower_is_better")


@pytest.mark.parametrize(
    "content",
    [
        "caf\u00e9 \u4e2d".encode(),
        "caf\u00e9 \u4e2d".encode("utf-8-sig"),
        "caf\u00e9 \u4e2d".encode("utf-16"),
        "\ufeffcaf\u00e9 \u4e2d".encode("utf-16-be"),
        "  caf\u00e9 \u4e2d \r\n\n".encode(),
    ],
)
def test_captions_in_any_encoding_that_says_what_it_is(content, tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "win" / "0000.txt").write_bytes(content)
    assert pairs_in(tmp_path)[0].prompt == "caf\u00e9 \u4e2d"


@pytest.mark.parametrize(
    "content", ["caf\u00e9".encode("latin-1"), "a cat".encode("utf-16-le"), "a".encode("utf-32")]
)
def test_a_caption_in_another_encoding_is_skipped_by_name(content, tmp_path):
    write_folder(tmp_path, make_pairs(2))
    (tmp_path / "win" / "0001.txt").write_bytes(content)
    good, bad = pairs_in(tmp_path)
    assert good.prompt == "a red thing, number 0"
    assert isinstance(bad, Skipped)
    assert (bad.sample_id, bad.reason) == ("0001", SkipReason.MALFORMED)


def test_files_next_to_the_images_are_no_images(tmp_path):
    write_folder(tmp_path, make_pairs(2))
    for name in ("Thumbs.db", ".DS_Store", "._0000.png", "0000.json", "0001.npz", "desktop.ini"):
        (tmp_path / "lose" / name).write_bytes(b"x")
    (tmp_path / "win" / "more").mkdir()
    assert [pair.sample_id for pair in pairs_in(tmp_path)] == ["0000", "0001"]
    summary = open_data(PairConfig(path=str(tmp_path), resolution=8)).summary
    assert "set aside: 5 that are no images (win/more, lose/0000.json, " in summary


def test_an_image_of_any_name_is_one(tmp_path):
    write_folder(tmp_path, make_pairs(2))
    (tmp_path / "lose" / "0000.png").rename(tmp_path / "lose" / "0000.PNG")
    for side in ("win", "lose"):
        (tmp_path / side / "0001.png").rename(tmp_path / side / "0001")
    assert [pair.rejected.name for pair in pairs_in(tmp_path)] == ["0000.PNG", "0001"]


def test_a_caption_may_be_called_caption(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (tmp_path / "win" / "0000.txt").rename(tmp_path / "win" / "0000.caption")
    assert pairs_in(tmp_path)[0].prompt == "a red thing, number 0"


def test_links_that_lead_nowhere_and_folders_are_images_that_are_missing(tmp_path):
    write_folder(tmp_path, make_pairs(4))
    for name in ("0001", "0002", "0003"):
        (tmp_path / "lose" / f"{name}.png").unlink()
    (tmp_path / "lose" / "0001.png").symlink_to(tmp_path / "lose" / "0001.png")
    (tmp_path / "lose" / "0002.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "lose" / "0003.png").mkdir()
    source = open_source(tmp_path, max_bad_fraction=1.0)
    rows = source.preview(4).rows
    assert [row.unusable is None for row in rows] == [True, False, False, False]
    assert all(row.rejected.startswith("missing image") for row in rows[1:])


def test_of_two_captions_of_one_name_txt_is_read(tmp_path):
    write_folder(tmp_path, make_pairs(1))
    (file,) = (tmp_path / "win").glob("*.txt")
    expected = pairs_in(tmp_path)[0].prompt
    file.with_suffix(".caption").write_text("another")
    assert pairs_in(tmp_path)[0].prompt == expected
