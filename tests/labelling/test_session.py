"""Who is shown what, and what is on the disk when."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.errors import DataError
from diffalign.labelling import answers as answer_file
from diffalign.labelling.answers import Answer, AnswerFile, check_ranking
from diffalign.labelling.session import Session, StaleError, person_of
from diffalign.labelling.sources import GeneratedImages, PairsOfImages
from tests.labelling.builders import generated, grouped
from tests.layouts import make_pairs, write_parquet


@pytest.fixture
def items(tmp_path):
    return GeneratedImages(generated(tmp_path / "look", prompts=6))


def session(items, folder, **settings):
    folder.mkdir(exist_ok=True)
    return Session(items, folder, **{"order": range(len(items.items)), **settings})


def said(shown, person, choice, **more):
    shown.answer(person, shown.state(person)["item"]["token"], choice, **more)


def test_an_answer_says_what_was_shown_where(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    before = shown.state("Ana")
    said(shown, "Ana", "right", seconds=1.25)
    (line,) = (tmp_path / "labels/answers.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["person"], row["answer"], row["seconds"]) == ("Ana", "right", 1.25)
    left, right = row["order"]
    by_side = [shown.items.content(0).images[side].read_bytes() for side in (left, right)]
    assert row["digests"] == list(shown.items.content(0).digests())
    assert by_side[0] != by_side[1]
    (((one, other), verdict),) = Answer(
        **{**row, "order": tuple(row["order"]), "digests": tuple(row["digests"])}
    ).verdicts()
    assert (one, other) == (0, 1)
    assert verdict == ("first" if right == 0 else "second")
    after = shown.state("Ana")
    assert (before["done"], after["done"]) == (0, 1)
    assert before["item"]["token"] != after["item"]["token"]


def test_nothing_that_a_browser_gets_tells_the_model(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    text = json.dumps(shown.state("Ana"))
    for secret in ("base", "new", "p0", ".png", str(tmp_path)):
        assert secret not in text
    token = shown.state("Ana")["item"]["images"][0]
    assert shown.png(token).startswith(b"\x89PNG")
    assert b"tEXt" not in shown.png(token)
    assert shown.png("0" * 32) is None
    assert shown.png("../../labels/answers.jsonl") is None


def test_sides_are_at_random_and_follow_from_seed_item_and_person(tmp_path):
    items = GeneratedImages(generated(tmp_path / "look", prompts=200))

    def lefts(person, seed):
        shown = session(items, tmp_path / "labels", seed=seed)
        return [shown._sides(person, number)[0] for number in range(200)]

    assert lefts("Ana", 0) == lefts("Ana", 0)
    assert len({tuple(lefts(*who)) for who in (("Ana", 0), ("Ana", 1), ("Ben", 0))}) == 3
    assert 70 < sum(lefts("Ana", 0)) < 130  # of 200 at one half: four deviations


def test_an_undo_takes_back_the_last_answer_and_asks_again(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    for choice in ("left", "tie"):
        said(shown, "Ana", choice)
    second = AnswerFile(tmp_path / "labels").by_person["Ana"]
    last = list(second)[-1]
    shown.undo("Ana", answered=2)
    assert shown.state("Ana")["done"] == 1
    shown.undo("Ana", answered=2)  # sent again: nothing more is taken back
    assert shown.state("Ana")["done"] == 1
    for again in (shown, session(items, tmp_path / "labels")):  # also after a restart
        assert again.items.items[again._current("Ana")].item_id == last
    said(shown, "Ana", "both_bad")
    found = AnswerFile(tmp_path / "labels").by_person["Ana"]
    assert [answer.answer for answer in found.values()] == ["left", "both_bad"]
    assert list(found)[-1] == last


def test_an_answer_that_is_sent_again_counts_once(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    token = shown.state("Ana")["item"]["token"]
    shown.answer("Ana", token, "left")
    shown.answer("Ana", token, "left")
    again = session(items, tmp_path / "labels")
    again.answer("Ana", token, "left")
    assert len(list(again.answers.all())) == 1
    with pytest.raises(StaleError):
        again.answer("Ben", token, "left")


def test_nobody_sees_an_item_twice_and_all_see_all(items, tmp_path):
    order = [3, 1, 2, 0, 5, 4]
    seen = {name: [] for name in ("Ana", "Ben")}
    rng = random.Random(0)
    shown = session(items, tmp_path / "labels", order=order)
    for _ in range(12):
        name = rng.choice([name for name, numbers in seen.items() if len(numbers) < 6])
        seen[name].append(shown._current(name))
        said(shown, name, rng.choice(["left", "right", "tie", "both_bad", "skip"]))
        if rng.random() < 0.3:
            shown = session(items, tmp_path / "labels", order=order)
    assert seen == {"Ana": order, "Ben": order}
    assert shown.state("Ana")["item"] is None
    assert (shown.state("Ana")["done"], shown.state("Ana")["total"]) == (6, 6)


def test_so_many_people_answer_an_item_and_no_more(items, tmp_path):
    shown = session(items, tmp_path / "labels", people=1)
    first = {name: shown._current(name) for name in ("Ana", "Ben")}
    assert first == {"Ana": 0, "Ben": 1}  # what another one looks at is theirs
    said(shown, "Ana", "skip")  # says nothing, so that somebody else is asked
    said(shown, "Ben", "left")
    while shown.state("Ben")["item"] is not None:
        said(shown, "Ben", "left")
    assert shown.state("Ben")["done"] == 6
    assert shown.state("Ana")["item"] is None
    decided = Counter(a.item for a in shown.answers.all() if a.answer != "skip")
    assert set(decided.values()) == {1}
    assert len(decided) == 6


def test_what_cannot_be_shown_is_passed_over_and_listed(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    shown.items.content(0).images[0].write_bytes(b"no image")
    assert shown._current("Ana") == 1
    assert shown.state("Ana")["total"] == 5
    (line,) = (tmp_path / "labels/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "corrupt image"


def test_rankings_are_of_sides_and_not_of_places(tmp_path):
    from diffalign.labelling.sources import GroupsOfImages

    shown = session(GroupsOfImages(grouped(tmp_path / "groups")), tmp_path / "labels")
    order = shown._sides("Ana", 0)
    said(shown, "Ana", "ranking", ranking=[[2], [0, 1]])
    (answer,) = shown.answers.all()
    assert answer.ranking == ((order[2],), tuple(sorted((order[0], order[1]))))
    for bad in ([[0], [0]], [[0]], [[0], []], [[0], [4]], [[0], [True]]):
        with pytest.raises(ValueError):
            said(shown, "Ana", "ranking", ranking=bad)
    with pytest.raises(ValueError, match="4 sides are ranked"):
        said(shown, "Ana", "left")
    check_ranking([[3], [0, 1, 2]], 4)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e9])
def test_a_time_that_cannot_be_is_none(items, tmp_path, seconds):
    shown = session(items, tmp_path / "labels")
    said(shown, "Ana", "left", seconds=seconds)
    assert next(shown.answers.all()).seconds is None


def test_a_disk_that_refuses_leaves_the_item_open(items, tmp_path, monkeypatch):
    shown = session(items, tmp_path / "labels")
    said(shown, "Ana", "left")

    def full(*_):
        raise OSError(28, "No space left on device")

    token = shown.state("Ana")["item"]["token"]
    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "append_json_lines", full)
        with pytest.raises(DataError, match=r"answers\.jsonl: cannot be written"):
            shown.answer("Ana", token, "right")
        with pytest.raises(DataError, match="cannot be written"):
            shown.undo("Ana", answered=1)
    assert shown.state("Ana")["item"]["token"] == token
    shown.answer("Ana", token, "right")
    assert [a.answer for a in AnswerFile(tmp_path / "labels").all()] == ["left", "right"]


def test_labels_of_other_data_are_refused(items, tmp_path):
    said(session(items, tmp_path / "labels"), "Ana", "left")
    other = GeneratedImages(generated(tmp_path / "other", models=("x", "y")))
    with pytest.raises(DataError, match="1 answers are on items that this data has not"):
        session(other, tmp_path / "labels")
    more = GeneratedImages(generated(tmp_path / "look", prompts=9))  # generated on: the same items
    assert len(session(more, tmp_path / "labels").order) == 9
    pairs = PairsOfImages(
        PairConfig(path=str(write_parquet(tmp_path / "a", make_pairs(2))), resolution=8)
    )
    with pytest.raises(DataError, match=r"session\.json says so"):
        session(pairs, tmp_path / "labels")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"person": "Ana", "item": "x", "answer": "undo"}', "not the last answer"),
        ('{"person": "Ana", "item": "x", "answer": "maybe"}', "maybe"),
        ("no json", "is not JSON"),
    ],
)
def test_a_damaged_file_is_named_by_its_line(tmp_path, line, complaint):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=f"line 1.*{complaint}"):
        AnswerFile(tmp_path)


def test_an_unfinished_line_is_what_a_killed_process_leaves(items, tmp_path):
    shown = session(items, tmp_path / "labels")
    said(shown, "Ana", "left")
    path = tmp_path / "labels/answers.jsonl"
    path.write_bytes(path.read_bytes() + b'{"person": "Ana", "it')
    again = session(items, tmp_path / "labels")
    said(again, "Ana", "right")
    assert [a.answer for a in AnswerFile(tmp_path / "labels").all()] == ["left", "right"]


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\0b", "a\x1b[2J"])
def test_names_can_be_read(name):
    with pytest.raises(ValueError, match="1 to 60"):
        person_of(name)
    assert person_of("  Ana \n Ray ") == "Ana Ray"
