"""Ties that are kept, and pairs that count by how often their prompt was asked about."""

from __future__ import annotations

import dataclasses

import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.known_columns import pickapic_columns
from diffalign.data.rows import Row
from diffalign.data.skipping import LeftOut, UnusableRowError
from diffalign.errors import DataError
from tests.data.conftest import open_source, take
from tests.layouts import WRITERS, make_pairs, pickapic_rows, write_rows

NAMES = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "num_example_per_prompt"]


def mapping(**changes):
    columns = pickapic_columns(NAMES, lower_is_better=False)
    return dataclasses.replace(columns, pairs_per_prompt=None, **changes)


def row(label_0, label_1, count=4):
    values = (("a cat"), b"zero", b"one", label_0, label_1, count)
    return Row("row-7", dict(zip(NAMES, values, strict=True)))


def data_with_a_tie(folder):
    rows = pickapic_rows(make_pairs(4))
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    for i, values in enumerate(rows):
        values["num_example_per_prompt"] = 2**i
    write_rows(folder / "train.parquet", rows)
    return folder


def test_a_kept_tie_is_half_a_preference_for_the_first_image():
    pair = mapping(keep_ties=True).pair(row(0.5, 0.5), None)
    assert (pair.chosen, pair.rejected, pair.strength.preference) == (b"zero", b"one", 0.5)
    assert mapping(keep_ties=True).chosen(row(0.5, 0.5)) == 0


def test_decided_pairs_stay_decided_where_ties_are_kept():
    pair = mapping(keep_ties=True).pair(row(0.0, 1.0), None)
    assert (pair.chosen, pair.rejected, pair.strength.preference) == (b"one", b"zero", 1.0)


def test_rows_without_a_label_are_no_ties():
    assert mapping(keep_ties=True).pair(row(None, 1.0), None) is LeftOut.UNLABELLED


@pytest.mark.parametrize("count", [4, b"4", "4"])
def test_a_pair_counts_one_over_the_pairs_of_its_prompt(count):
    columns = dataclasses.replace(mapping(), pairs_per_prompt="num_example_per_prompt")
    assert columns.pair(row(1.0, 0.0, count), None).strength.weight == 0.25
    assert mapping().pair(row(1.0, 0.0, count), None).strength.weight is None


@pytest.mark.parametrize("count", [0, -1, None, "many"])
def test_a_count_that_is_none_is_refused(count):
    columns = dataclasses.replace(mapping(), pairs_per_prompt="num_example_per_prompt")
    with pytest.raises(UnusableRowError, match=r"num_example_per_prompt is .*at least 1"):
        columns.pair(row(1.0, 0.0, count), None)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_carry_preference_and_importance(streaming, tmp_path):
    folder = data_with_a_tie(tmp_path)
    source = open_source(
        folder, pairs_per_device=4, ties="keep", weighting="per_prompt", streaming=streaming
    )
    (batch,) = take(source, 1)
    found = {
        sample_id.split("-")[0]: (preference, importance)
        for sample_id, preference, importance in zip(
            batch.sample_ids,
            batch.strength["preference"].tolist(),
            batch.strength["weight"].tolist(),
            strict=True,
        )
    }
    assert found == {
        "1000": (1.0, 1.0),
        "1001": (0.5, 0.5),
        "1002": (1.0, 0.25),
        "1003": (1.0, 0.125),
    }


def test_by_default_ties_are_left_out_and_all_pairs_count_alike(tmp_path):
    source = open_source(data_with_a_tie(tmp_path), pairs_per_device=3)
    (batch,) = take(source, 1)
    assert batch.strength == {}
    assert source.left_out_counts == {"tie": 1}


def test_the_summary_says_what_becomes_of_ties_and_weights(tmp_path):
    folder = data_with_a_tie(tmp_path)
    plain = PairConfig(path=str(folder), resolution=16)
    kept = dataclasses.replace(plain, ties="keep", weighting="per_prompt")
    assert "ties are kept" in open_data(kept).summary
    assert "weighted by 1 / num_example_per_prompt" in open_data(kept).summary
    assert "kept" not in open_data(plain).summary and "weighted" not in open_data(plain).summary


@pytest.mark.parametrize("kind", sorted(set(WRITERS) - {"pickapic"}))
def test_weighting_needs_the_counts(kind, tmp_path):
    WRITERS[kind](tmp_path / "set", make_pairs(2))
    config = PairConfig(path=str(tmp_path / "set"), resolution=16, weighting="per_prompt")
    with pytest.raises(DataError, match=r"needs the column num_example_per_prompt.*uniform"):
        open_data(config)
