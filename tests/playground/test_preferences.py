"""The shipped preference pairs are what their description says."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.playground.models import playground_preferences_path
from diffalign.playground.oracle import fidelity, read_objects
from diffalign.playground.scenes import HELD_OUT, parse_caption


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(playground_preferences_path() / "train.parquet").to_pylist()


def test_there_are_a_thousand_decided_pairs_and_some_ties(rows):
    labels = [(row["label_0"], row["label_1"]) for row in rows]
    assert set(labels) == {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)}
    assert len(labels) - labels.count((0.5, 0.5)) >= 1000
    assert 0.4 < labels.count((1.0, 0.0)) / (len(labels) - labels.count((0.5, 0.5))) < 0.6


def test_no_held_out_combination_is_asked_for(rows):
    assert all(set(parse_caption(row["caption"])).isdisjoint(HELD_OUT) for row in rows)


def test_labels_are_what_the_oracle_says_of_the_stored_bytes(rows):
    for row in rows[:100]:
        first, second = (
            fidelity(read_objects(Image.open(io.BytesIO(row[name]))), row["caption"])
            for name in ("jpg_0", "jpg_1")
        )
        expected = 1.0 if first > second else 0.0 if first < second else 0.5
        assert (row["label_0"], row["label_1"]) == (expected, 1 - expected)


def test_uids_name_the_better_image_and_never_repeat(rows):
    uids = [row[name] for row in rows for name in ("image_0_uid", "image_1_uid")]
    assert len(set(uids)) == len(uids)
    for row in rows:
        winner = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: ""}[row["label_0"]]
        assert row["best_image_uid"] == winner
