import pytest

from diffalign.data.responses.coco import KnownIds, file_names, find_image, image_file, image_number

SPELLINGS = [
    139,
    139.0,
    "139",
    " 139 ",
    "000000000139",
    "000000000139.jpg",
    "139.png",
    "COCO_val2014_000000000139.jpg",
    "COCO_train2014_000000000139",
    "val2014/COCO_val2014_000000000139.jpg",
    "C:\\coco\\val2017\\000000000139.JPG",
    "/data/coco/000000000139.jpeg",
]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_number(name):
    assert image_number(name) == 139


@pytest.mark.parametrize(
    "name",
    [True, None, -1, 1.5, float("nan"), float("inf"), "", "dog.jpg", "a139.jpg", "1-2", "9" * 13],
)
def test_other_names_are_none(name):
    assert image_number(name) is None


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("known", ["139", "000000000139", "COCO_val2014_000000000139.jpg"])
def test_ids_meet_in_any_spelling(name, known):
    assert KnownIds([known, "dog.jpg", "7"]).find(name) == known


def test_the_same_spelling_comes_before_the_number():
    ids = KnownIds(["0042", "42", "7"])
    assert ids.find("42") == "42" and ids.find("0042") == "0042"
    assert ids.find("042") is None  # either could be meant
    assert ids.find(43) is None and ids.find("cat") is None
    assert ids.examples(2) == "0042, 42, ..."


@pytest.mark.parametrize("name", file_names(139))
@pytest.mark.parametrize("below", ["", "val2014", "train2017"])
def test_a_file_is_found_under_every_name(name, below, tmp_path):
    path = tmp_path / below / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_image(tmp_path, 139) == path
    assert find_image(tmp_path, 13) is None
    assert image_file(tmp_path, "COCO_test2015_000000000139.jpg") in (
        path,
        tmp_path / "COCO_test2015_000000000139.jpg",
    )
    assert image_file(tmp_path, "dog.jpg") == tmp_path / "dog.jpg"


def test_numbers_too_large_for_a_name_are_not_looked_for(tmp_path):
    assert find_image(tmp_path, 10**400) is None
