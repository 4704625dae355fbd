"""Pairs of responses kept, left out and put in order by a number of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.data.layout import Layout
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.ranking import (
    NumbersOf,
    RankingConfig,
    ranked,
    read_pair_numbers,
    write_pair_numbers,
)
from diffalign.data.responses.source import ResponseSource
from diffalign.errors import DataError
from diffalign.models.vlm.config import VLM
from tests.tiny_vlm import tiny_llava

NUMBERS = [3.0, math.nan, 1.0, 2.0, None, 0.0]
RATINGS = [(9, 2), (9, 7), (9, 4), (5, 1)]


def by(**settings: Any) -> RankingConfig:
    return RankingConfig(by="labels", **settings)


@pytest.mark.parametrize(
    ("settings", "kept", "bands"),
    [
        ({"keep": 0.5}, [2, 5], None),
        ({"keep": 0.5, "first": "highest"}, [0, 3], None),
        ({"bands": 2}, [0, 2, 3, 5], [1, 0, 1, 0]),
        ({"bands": 2, "first": "highest"}, [0, 2, 3, 5], [0, 1, 0, 1]),
        ({"bands": 2, "keep": 0.5}, [2, 5], [1, 0]),
        ({"bands": 2, "only": 2}, [0, 3], None),
    ],
)
def test_pairs_by_their_numbers(settings, kept, bands):
    found = ranked(NUMBERS, by(**settings))
    assert found.kept.tolist() == kept
    assert (None if found.bands is None else found.bands.tolist()) == bands
    assert found.unknown == 2


def test_equal_numbers_keep_the_order_of_the_data():
    assert ranked([1.0] * 5, by(keep=0.4)).kept.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "leaves nothing out and orders nothing"),
        ({"bands": 2, "only": 3}, "only is 3, and there are 2 bands"),
        ({"bands": 2, "file": Path("x.parquet")}, "by is labels and file is x.parquet"),
        ({"keep": 0.0}, "keep must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        by(**settings)


def test_numbers_that_are_not_there_are_refused():
    with pytest.raises(DataError, match="no pair of the data has that number"):
        ranked([None, math.nan], by(keep=0.5))
    with pytest.raises(DataError, match="3 bands, and 2 pairs are kept"):
        ranked([1.0, 2.0], by(bands=3))


ABOUT = NumbersOf(data="these", model={"path": "llava"})


def test_a_file_of_numbers_is_of_its_data(tmp_path):
    file = tmp_path / "numbers.parquet"
    write_pair_numbers(file, ABOUT, [{"sample_id": "a", "ches": 1.5}], ["ches"])
    assert read_pair_numbers(file, "ches", data="these") == {"a": 1.5}
    with pytest.raises(DataError, match="of other data"):
        read_pair_numbers(file, "ches", data="those")
    with pytest.raises(DataError, match=r"by is chess, and .* has ches\. Did you mean"):
        read_pair_numbers(file, "chess", data="these")
    with pytest.raises(DataError, match="no such file"):
        read_pair_numbers(tmp_path / "gone.parquet", "ches", data="these")
    (tmp_path / "other.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="no file of numbers of pairs"):
        read_pair_numbers(tmp_path / "other.parquet", "ches", data="these")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return VLM(path=str(tiny_llava(tmp_path_factory.mktemp("llava")))).processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": "What?",
            "chosen": f"a cat {number}",
            "rejected": "no",
            "score_chosen": high,
            "score_rejected": low,
        }
        for number, (high, low) in enumerate(RATINGS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def opened(folder: Path, processor: Any, ranking: RankingConfig | None) -> ResponseSource:
    return ResponseSource.open(
        ResponseConfig(path=str(folder / "pairs.jsonl"), ranking=ranking, workers=0),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        layout=Layout.start(samples_per_device=1, accumulation=1),
        processor=processor,
        skipped=None,
    )


def first(source: ResponseSource, count: int) -> list[str]:
    return [batch.sample_ids[0] for batch in source.ahead(count)]


def numbers_in(folder: Path, processor: Any, values: list[float]) -> RankingConfig:
    source = opened(folder, processor, None)
    ids = sorted(first(source, len(values)))
    rows = [{"sample_id": name, "ches": v} for name, v in zip(ids, values, strict=True)]
    about = NumbersOf(data=source.data_fingerprint, model={})
    write_pair_numbers(folder / "numbers.parquet", about, rows, ["ches"])
    return RankingConfig(by="ches", file=folder / "numbers.parquet", bands=4, passes=2)


def test_bands_come_one_after_the_other(folder, processor):
    ids = sorted(first(opened(folder, processor, None), 4))
    source = opened(folder, processor, numbers_in(folder, processor, [4.0, 3.0, 1.0, 2.0]))
    expected = [ids[place] for place in np.repeat([2, 3, 1, 0], 2)]
    assert first(source, 9) == [*expected, ids[2]]
    assert any(
        "ranked by ches, the lowest first, in 4 bands: 4 pairs" in s for s in source.describe()
    )


def test_ratings_of_the_data_order_pairs_by_their_gap(folder, processor):
    ids = sorted(first(opened(folder, processor, None), 4))
    source = opened(folder, processor, by(bands=4, first="highest"))
    assert first(source, 4) == [ids[0], ids[2], ids[3], ids[1]]  # gaps of 7, 5, 4 and 2


def test_a_checkpoint_goes_on_with_its_own_numbers_alone(folder, processor):
    ranking = numbers_in(folder, processor, [4.0, 3.0, 1.0, 2.0])
    source = opened(folder, processor, ranking)
    batches = iter(source)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(source.state_dict()))
    again = opened(folder, processor, ranking)
    again.load_state_dict(state)
    assert first(again, 1) == first(source, 1)
    other = opened(folder, processor, numbers_in(folder, processor, [1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(DataError, match="other numbers than those of"):
        other.load_state_dict(state)
