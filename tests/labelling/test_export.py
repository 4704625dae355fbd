"""The files of votes, as the readers of training read them."""

from __future__ import annotations

import json
from itertools import combinations, permutations

import pyarrow.parquet as pq
import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.data.strength.settings import StrengthConfig
from diffalign.data.strength.votes import Votes as VotesPreference
from diffalign.errors import DataError
from diffalign.labelling.answers import Answer
from diffalign.labelling.export import Votes, majority_pairs, write_preferences, write_votes
from diffalign.labelling.sources import GeneratedImages, GroupsOfImages, PairsOfResponses
from diffalign.rollouts.preferences import read_preferences
from tests.data.conftest import open_source, take
from tests.labelling.builders import generated, grouped, responses

SHARE = StrengthConfig(preference=VotesPreference(prior=0))


def given(items, number, *choices, order=(0, 1)):
    """One answer a person; `left` is the first side unless `order` turns them."""
    return [
        Answer(
            person=f"person {n}",
            item=items.items[number].item_id,
            answer=choice,
            order=order,
            digests=items.content(number).digests(),
        )
        for n, choice in enumerate(choices)
    ]


@pytest.fixture
def items(tmp_path):
    return GeneratedImages(generated(tmp_path / "look", prompts=6))


@pytest.fixture
def answers(items):
    return [
        *given(items, 0, "left", "left", "left", "right"),
        *given(items, 1, "left", "left", "right", order=(1, 0)),
        *given(items, 2, "left", "right", "tie", "both_bad"),
        *given(items, 3, "tie", "right", "skip"),
        *given(items, 4, "both_bad", "skip"),
    ]


def test_votes_are_counted_by_side_of_the_data(items, answers, tmp_path):
    written = write_votes(items, answers, tmp_path, {"answers": len(answers)})
    rows = pq.read_table(written.path).to_pylist()
    assert [(r["votes_0"], r["votes_1"]) for r in rows] == [(3, 1), (1, 2), (1.5, 1.5), (0.5, 1.5)]
    assert [(r["label_0"], r["label_1"]) for r in rows] == [(1, 0), (0, 1), (0.5, 0.5), (0, 1)]
    assert [(r["ties"], r["both_bad"]) for r in rows] == [(0, 0), (0, 0), (1, 1), (1, 0)]
    assert {(r["model_0"], r["model_1"]) for r in rows} == {("base", "new")}
    assert rows[1]["jpg_0"] == items.content(1).images[0].read_bytes()
    assert (written.rows, "1 left out" in written.said) == (4, True)


def test_three_votes_to_one_are_three_quarters_in_the_batch(items, answers, tmp_path):
    write_votes(items, answers, tmp_path / "labels", {})
    folder = tmp_path / "labels/pairs.parquet"
    (batch,) = take(open_source(folder, pairs_per_device=3, strength=SHARE, caption_dropout=0.0), 1)
    found = dict(zip(batch.prompts, batch.strength["preference"].tolist(), strict=True))
    assert found == pytest.approx(
        {"a thing, number 0": 3 / 4, "a thing, number 1": 2 / 3, "a thing, number 3": 3 / 4}
    )
    opened = open_data(PairConfig(path=str(folder), resolution=32))
    assert "read by pickapic" in opened.summary
    chosen = {pair.prompt: pair.chosen for pair in opened.pairs()}
    assert chosen["a thing, number 0"] == items.content(0).images[0].read_bytes()
    assert chosen["a thing, number 1"] == items.content(1).images[1].read_bytes()


def test_provenance_is_in_the_metadata_and_names_nobody(items, answers, tmp_path):
    path = write_votes(items, answers, tmp_path, {"question": "Which?", "people": 4}).path
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"diffalign.labels"]) == {"question": "Which?", "people": 4}
    assert b"person 0" not in path.read_bytes()


def test_data_that_has_changed_since_is_refused(items, answers, tmp_path):
    items.content(1).images[0].write_bytes(items.content(2).images[0].read_bytes())
    with pytest.raises(DataError, match="no longer what people judged"):
        write_votes(items, answers, tmp_path, {})
    items.content(1).images[0].unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        write_votes(items, answers, tmp_path, {})
    assert not list(tmp_path.glob("pairs*"))


def test_responses_come_out_as_trl_has_them(tmp_path):
    items = PairsOfResponses(ResponseConfig(path=str(responses(tmp_path / "rows"))))
    answers = [
        *given(items, 0, "right", "right", "left"),
        *given(items, 1, "tie"),
        *given(items, 2, "left", "tie"),
    ]
    written = write_votes(items, answers, tmp_path, {})
    assert (written.rows, "1 left out" in written.said) == (2, True)
    opened = open_responses(ResponseConfig(path=str(written.path)), strength=SHARE)
    assert "read as trl" in opened.summary
    first, second = (opened.pair(number, 0) for number in range(2))
    assert first.responses == {"chosen": "a bad answer 0", "rejected": "a good answer <b>0</b>"}
    assert first.images[0] == (tmp_path / "rows/0.png").read_bytes()
    assert first.turns[0].text.replace("\n", "") == "<image>What is number 0?"
    assert first.strength.preference == pytest.approx(2 / 3)
    assert second.strength.preference == pytest.approx(3 / 4)


def ranked(items, number, person, ranking):
    return Answer(
        person=person,
        item=items.items[number].item_id,
        answer="ranking",
        order=(0, 1, 2, 3),
        ranking=ranking,
        digests=items.content(number).digests(),
    )


def test_rankings_of_groups_are_read_by_d3po(tmp_path):
    items = GroupsOfImages(grouped(tmp_path / "groups"))
    answers = [
        ranked(items, 0, "Ana", ((3,), (0, 1))),
        ranked(items, 1, "Ana", ((0,), (1,), (2,), (3,))),
        ranked(items, 1, "Ben", ((1,), (0,), (2,))),
        ranked(items, 1, "Cem", ((0,), (1,), (3,), (2,))),
    ]
    written = write_preferences(answers, tmp_path)
    found = read_preferences(written.path, {group.group: 4 for group in items.groups})
    assert set(found["g0"].decided) == {(3, 0), (3, 1)}
    assert (found["g0"].tied, found["g0"].undecided) == (1, 3)
    assert set(found["g1"].decided) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}  # 2 and 3: 1 to 1
    pairs = pq.read_table(write_votes(items, answers, tmp_path, {}).path).to_pylist()
    votes = {
        (row["caption"], row["image_0_uid"], row["image_1_uid"]): (row["votes_0"], row["votes_1"])
        for row in pairs
    }
    digests = items.content(1).digests()
    assert votes["animal 1", digests[0], digests[1]] == (2, 1)
    assert len(pairs) == 3 + 6


def test_majorities_that_go_round_in_a_circle_lose_the_weakest():
    def votes(first, second):
        return Votes(first=first, second=second)

    circle = {(0, 1): votes(5, 2), (1, 2): votes(6, 1), (0, 2): votes(3, 4)}  # 0 > 1 > 2 > 0
    assert majority_pairs(circle) == ([(1, 2), (0, 1)], 1)
    for order in permutations(range(4)):  # what agrees with itself stays whole
        given = {
            (i, j): votes(2, 1) if order.index(i) < order.index(j) else votes(1, 2)
            for i, j in combinations(range(4), 2)
        }
        kept, left_out = majority_pairs(given)
        assert left_out == 0
        assert all(order.index(a) < order.index(b) for a, b in kept)
    assert majority_pairs({(0, 1): votes(1, 1)}) == ([], 0)
