from pathlib import Path

import datasets
import pytest

from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.preview import PairPreviewRow, without_download
from diffalign.data.pairs.scores import OrderConfig, ScoreFile, ScoresConfig
from diffalign.data.source import Preview
from diffalign.errors import DataError
from tests.data.conftest import open_source
from tests.layouts import WRITERS, make_pairs, pickapic_rows, write_rows


def preview(path, n, **settings) -> Preview[PairPreviewRow]:
    return open_source(path, **settings).preview(n)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_first_pairs_are_shown_with_size_and_caption(kind, tmp_path):
    WRITERS[kind](tmp_path, make_pairs(4, size=(40, 30)))
    shown = preview(tmp_path, 2)
    assert [row.prompt for row in shown.rows] == ["a red thing, number 0", "a red thing, number 1"]
    assert {row.chosen for row in shown.rows} == {row.rejected for row in shown.rows} == {(30, 40)}
    assert f"read by {kind}" in shown.lines[0]


def test_counts_and_skipped_rows_are_told(tmp_path):
    rows = pickapic_rows(make_pairs(5))
    rows[0]["label_0"] = rows[0]["label_1"] = 0.5
    rows[1]["caption"] = ""
    write_rows(tmp_path / "x.parquet", rows)
    shown = preview(tmp_path, 1, max_bad_fraction=0.5)
    assert shown.lines[1:] == [
        "5 rows: 4 pairs, 1 left out (tie)",
        "pairs skipped as unusable: 1 empty caption",
    ]


def test_an_image_that_cannot_be_used_is_shown_as_such(tmp_path):
    rows = pickapic_rows(make_pairs(2))
    rows[0]["jpg_0"] = b"garbage"
    write_rows(tmp_path / "x.parquet", rows)
    (row,) = preview(tmp_path, 1).rows
    assert row.chosen.startswith("corrupt image: no known image format")
    assert row.rejected == (32, 32)


def wrong_labels(folder):
    write_rows(folder / "x.parquet", [{**r, "label_0": 3.0} for r in pickapic_rows(make_pairs(2))])
    return folder


def test_wrong_labels_are_refused(tmp_path):
    message = r"1000-uid-0-0-uid-0-1 \(malformed row: label_0 is 3 \(allowed: 0, 0.5, 1\)"
    with pytest.raises(DataError, match=message):
        preview(wrong_labels(tmp_path), 1)


def test_a_stream_shows_wrong_labels_as_unusable_pairs(tmp_path):
    (row,) = preview(wrong_labels(tmp_path), 1, streaming=True).rows
    assert row.unusable.startswith("malformed row: label_0 is 3 (allowed: 0, 0.5, 1)")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_ties_is_refused(streaming, tmp_path):
    ties = [{**r, "label_0": 0.5, "label_1": 0.5} for r in pickapic_rows(make_pairs(2))]
    write_rows(tmp_path / "x.parquet", ties)
    with pytest.raises(DataError, match=r"nothing to train on|no row holds a preference"):
        preview(tmp_path, 1, streaming=streaming)


def test_no_more_pairs_are_shown_than_are_used(tmp_path):
    write_rows(tmp_path / "x.parquet", pickapic_rows(make_pairs(3)))
    assert len(preview(tmp_path, 3, limit=2).rows) == 2


def test_of_the_hub_nothing_is_downloaded(monkeypatch):
    asked = []

    def load(**arguments):
        asked.append(arguments["streaming"])
        return datasets.Dataset.from_list(pickapic_rows(make_pairs(2))).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    scores = ScoresConfig(
        columns={"a": ScoreFile(file=Path("a.parquet"), scorer="jpeg")}, order=OrderConfig(by="a")
    )
    config = without_download(
        PairConfig(path="some/where", resolution=16, buckets=True, scores=scores)
    )
    assert config.scores.order is None and config.scores.columns == scores.columns
    source = open_source(config.path, streaming=config.streaming, buckets=config.buckets)
    assert len(source.preview(2).rows) == 2
    assert source.fingerprint() == "some/where@main"
    assert asked and all(asked)


def test_local_data_is_opened_as_it_will_be(tmp_path):
    write_rows(tmp_path / "x.parquet", pickapic_rows(make_pairs(2)))
    config = PairConfig(path=str(tmp_path), resolution=16, buckets=True)
    assert without_download(config) == config


def test_a_dry_run_refuses_what_the_start_refuses(tmp_path):
    write_rows(tmp_path / "x.parquet", pickapic_rows(make_pairs(2)))
    with pytest.raises(DataError, match="pairs offer the views"):
        preview(tmp_path, 1, views=frozenset({"desirable"}))
