from __future__ import annotations

import pytest

from diffalign.checking.reading import CheckedPairs, CheckedResponses, PixelShare, read_all
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.data.skipping import LeftOut, SkipReason
from diffalign.errors import DataError
from tests.checking.planted import clean_rows, write
from tests.data.responses.formats.forms import write_lines
from tests.layouts import WRITERS, make_pairs, write_rows


def pairs(folder, *, share: float = 0, streaming: bool = True, along=()) -> CheckedPairs:
    config = PairConfig(path=str(folder), resolution=8, streaming=streaming)
    data = open_data(config, along=lambda name: name in along)
    return CheckedPairs(
        data=data,
        max_pixels=10**6,
        pixels=PixelShare(share=share),
        along=data.columns.along,
    )


def test_workers_read_what_one_process_reads(tmp_path):
    data = pairs(write(tmp_path, clean_rows(50)), share=0.5)
    rows, looks = read_all(data, workers=2)
    alone, their_looks = read_all(data, workers=0)
    assert rows == alone and looks == their_looks
    assert [row.name for row in rows] == [f"row-{n:08d}" for n in range(50)]


def test_a_share_of_the_images_is_decoded_the_same_in_every_run(tmp_path):
    data = pairs(write(tmp_path, clean_rows(50)), share=0.5)
    rows, looks = read_all(data, workers=0)
    digests = {image.digest for row in rows for image in row.images.values()}
    assert set(looks) < digests and 30 < len(looks) < 70
    assert all(digest in data.pixels for digest in looks)


def test_the_share_of_a_small_set_is_all_of_it(tmp_path):
    data = pairs(write(tmp_path, clean_rows(50)))
    assert data.count == 50
    assert data.share_of(100).share == data.share_of(4000).share == 1
    assert data.share_of(25).share == 0.25


@pytest.mark.parametrize("layout", ["webdataset", "pickapic"])
def test_a_stream_says_about_how_many_rows_it_has(layout, tmp_path):
    more = {"shards": 2} if layout == "webdataset" else {}
    data = pairs(WRITERS[layout](tmp_path / "data", make_pairs(12), **more))
    assert data.count == 12


def test_no_more_rows_are_read_than_the_limit(tmp_path):
    data = pairs(write(tmp_path, clean_rows(50)))
    rows, _ = read_all(data, workers=0, limit=20)
    assert [row.name for row in rows] == [f"row-{n:08d}" for n in range(20)]


@pytest.mark.parametrize("layout", WRITERS)
def test_images_of_a_row_are_read_again(layout, tmp_path):
    made = make_pairs(6)
    data = pairs(WRITERS[layout](tmp_path / "data", made))
    rows, _ = read_all(data, workers=0)
    for row, pair in zip(rows, made, strict=True):
        again = data.read_again(row)
        contents = [i if isinstance(i, bytes) else i.read_bytes() for i in again.values()]
        assert list(again) == ["chosen", "rejected"]
        assert contents == [pair.chosen, pair.rejected] and row.prompt == pair.caption


def test_rows_of_several_images_are_comparisons_of_one_origin(tmp_path):
    images = [pair.chosen for pair in make_pairs(3)]
    rows = [{"prompt": f"a {n}", "images": images, "scores": [3, 2, 2], "nsfw": n} for n in (0, 1)]
    write_rows(tmp_path / "pairs.parquet", rows)
    data = pairs(tmp_path, along=("nsfw",))
    assert data.grouped and data.count == 6
    found, _ = read_all(data, workers=0)
    assert [row.origin for row in found] == ["row-00000000"] * 3 + ["row-00000001"] * 3
    assert [row.left_out for row in found[:3]] == [None, None, LeftOut.TIE]
    assert [row.values["nsfw"] for row in found] == [0, 0, 0, 1, 1, 1]
    assert found[0].first_won is None and found[2].images == {}
    assert list(data.read_again(found[4]).values()) == [images[0], images[2]]


def test_who_was_named_first_is_known_where_columns_say_it(tmp_path):
    data = pairs(write(tmp_path, clean_rows(4)))
    rows, _ = read_all(data, workers=0)
    assert [row.first_won for row in rows] == [True, False, True, False]
    fixed = pairs(WRITERS["folder"](tmp_path / "fixed", make_pairs(4)))
    rows, _ = read_all(fixed, workers=0)
    assert [row.first_won for row in rows] == [None] * 4


def test_a_broken_shard_is_refused_by_workers_as_well(tmp_path):
    folder = WRITERS["webdataset"](tmp_path / "data", make_pairs(8), shards=2)
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read_all(pairs(folder), workers=2)


def test_responses_have_images_lengths_and_reasons(tmp_path):
    rows = [
        {"prompt": "What is it?", "chosen": "A red thing.", "rejected": "A cat", "image": "0.png"},
        {"prompt": "What is it?", "chosen": "Yes.", "rejected": "Yes.", "image": "0.png"},
        {"prompt": "What is it?", "chosen": "No.", "rejected": "Yes.", "image": "gone.png"},
        {"prompt": "What is it?", "chosen": "No.", "rejected": "Yes.", "image": None},
    ]
    data = CheckedResponses(
        data=open_responses(ResponseConfig(path=str(write_lines(tmp_path, rows)))), max_pixels=10**6
    )
    found, _ = read_all(data, workers=0)
    first, same, gone, none = found
    assert {side: each.words for side, each in first.responses.items()} == {
        "chosen": 3,
        "rejected": 2,
    }
    assert list(first.images) == ["image 1"] and first.images["image 1"].reason is None
    assert same.skipped is not None and same.skipped.reason is SkipReason.IDENTICAL
    assert gone.images["image 1"].reason is SkipReason.MISSING_IMAGE
    assert none.skipped is not None and none.skipped.reason is SkipReason.MISSING_IMAGE
    assert data.texts(first) == {
        "prompt": "<image> What is it?",
        "chosen": "A red thing.",
        "rejected": "A cat",
    }
