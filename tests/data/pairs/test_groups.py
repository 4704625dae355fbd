"""Rows of several images: every decided pair of them is trained, and nothing else."""

from __future__ import annotations

import json

import datasets
import pytest

from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.groups import GroupColumns, GroupStream, pareto_fronts
from diffalign.data.pairs.recognition import recognise
from diffalign.data.rows import AbstractRowStream, Row, Schema
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from diffalign.data.strength.settings import StrengthConfig
from diffalign.errors import DataError
from tests.data.conftest import ids, open_source, take
from tests.data.pairs.formats.test_webdataset import write_tar
from tests.layouts import encoded, solid_image, write_rows

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
IMAGES = [encoded(solid_image(colour)) for colour in COLOURS]
RANKS = [2, 1, 4, 3]
BETTER = {(1, 0), (0, 3), (0, 2), (1, 3), (1, 2), (3, 2)}
"""(better, worse) of these ranks."""


def rows_of(count=3, **changes):
    structs = [{"bytes": image, "path": None} for image in IMAGES]
    return [{"prompt": f"a {i}", "images": structs, "rank": RANKS, **changes} for i in range(count)]


def opened(path, **settings):
    return open_data(PairConfig(path=str(path), resolution=16, **settings))


def found(path, **settings):
    return list(opened(path, **settings).pairs())


def indices(pairs):
    return {(IMAGES.index(pair.chosen), IMAGES.index(pair.rejected)) for pair in pairs}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_of_ranks_decides_every_pair_of_a_row(streaming, tmp_path):
    write_rows(tmp_path / "x.parquet", rows_of())
    pairs = found(tmp_path, streaming=streaming)
    assert len(pairs) == 18
    assert indices(pairs[:6]) == BETTER
    assert [pair.sample_id for pair in pairs[:2]] == ["row-00000000[0,1]", "row-00000000[0,2]"]
    assert len({pair.sample_id for pair in pairs}) == 18
    assert [pair.prompt for pair in pairs[5:7]] == ["a 0", "a 1"]


@pytest.mark.parametrize(
    ("column", "labels", "reversed"),
    [
        ("rank", "by_name", False),
        ("score", "by_name", True),
        ("rank", "higher_is_better", True),
        ("score", "lower_is_better", False),
    ],
)
def test_a_rank_is_better_if_smaller_and_a_score_if_larger(column, labels, reversed, tmp_path):
    rows = [{"prompt": "p", "images": IMAGES, column: RANKS}]
    write_rows(tmp_path / "x.parquet", rows)
    expected = {pair[::-1] for pair in BETTER} if reversed else BETTER
    assert indices(found(tmp_path, labels=labels)) == expected
    which = "larger" if reversed else "smaller"
    assert f"the one with the {which} of {column}" in opened(tmp_path, labels=labels).summary


def test_equal_ranks_are_ties_and_missing_ones_no_label(tmp_path):
    rows = [*rows_of(1, rank=[1, 1, 2, None]), *rows_of(1, rank=None), *rows_of(1, rank=[1])]
    write_rows(tmp_path / "x.parquet", rows)
    assert indices(found(tmp_path)) == {(0, 2), (1, 2)}
    source = open_source(tmp_path)
    assert source.left_out_counts == {LeftOut.TIE.value: 1, LeftOut.UNLABELLED.value: 5}
    assert "8 comparisons: 2 pairs" in source.describe()[1]
    assert len(found(tmp_path, ties="keep")) == 3


def write_lines(folder, *rows):
    for index, image in enumerate(IMAGES):
        (folder / f"{index}.png").write_bytes(image)
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(pairs):
    return {(int(pair.chosen.stem), int(pair.rejected.stem)) for pair in pairs}


@pytest.mark.parametrize(
    "row",
    [
        {"image_path": ["0.png", "1.png", "2.png", "3.png"], "rank": RANKS},  # HPDv2, test
        {f"image_{i}": f"{i}.png" for i in range(4)}
        | {f"score_{i}": -r for i, r in enumerate(RANKS)},
        {f"image{i + 1}": f"{i}.png" for i in range(4)}
        | {f"rank{i + 1}": RANKS[i] for i in range(4)},
        {f"jpg_{i}": f"{i}.png" for i in range(4)}
        | {f"label_{i}": -r for i, r in enumerate(RANKS)},
        {f"image_{i}": f"{i}.png" for i in range(4)} | {"ranks": RANKS},
    ],
)
def test_the_layouts_of_several_images_are_recognised(row, tmp_path):
    write_lines(tmp_path, {"prompt": "p", **row})
    assert names(found(tmp_path)) == BETTER


def test_a_preference_of_1_and_0_for_two_paths(tmp_path):
    paths = ["3.png", "1.png"]
    write_lines(tmp_path, {"prompt": "p", "file_path": paths, "human_preference": [0, 1]})
    assert names(found(tmp_path)) == {(1, 3)}


@pytest.mark.parametrize("flip", [False, True])
def test_one_image_next_to_a_list_of_others(flip, tmp_path):
    one, many = ("rejected", "chosen") if flip else ("chosen", "rejected")
    write_lines(tmp_path, {"prompt": "p", one: "0.png", many: ["1.png", "2.png", "3.png"]})
    expected = {(0, 1), (0, 2), (0, 3)}
    assert names(found(tmp_path)) == ({pair[::-1] for pair in expected} if flip else expected)


@pytest.mark.parametrize("columns", [{"images": "a,b,c", "scores": "x, y, z"}])
def test_columns_of_your_own(columns, tmp_path):
    row = {"t": "p", "a": "0.png", "b": "1.png", "c": "2.png", "x": 3, "y": 2, "z": 1}
    write_lines(tmp_path, row)
    assert names(found(tmp_path, columns={"prompt": "t", **columns})) == {(0, 1), (0, 2), (1, 2)}


def test_columns_of_your_own_that_do_not_fit_are_refused(tmp_path):
    write_lines(tmp_path, {"t": "p", "a": "0.png", "b": "1.png", "x": 3})
    with pytest.raises(DataError, match=r"data.columns.scores names y.* has t, a, b, x"):
        found(tmp_path, columns={"prompt": "t", "images": "a,b", "scores": "x,y"})


def test_lists_in_the_json_of_a_tar(tmp_path):
    fields = json.dumps({"ranks": RANKS, "caption": "c"}).encode()
    members = [(f"k.image_{i}.png", image) for i, image in enumerate(IMAGES)]
    write_tar(tmp_path / "x.tar", *members, ("k.json", fields))
    assert indices(found(tmp_path)) == BETTER


def test_lists_of_a_hub_data_set(monkeypatch):
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.Sequence(datasets.Image()),
            "rank": datasets.Sequence(datasets.Value("int64")),
        }
    )
    hub = datasets.Dataset.from_list(rows_of(1), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub.to_iterable_dataset())
    assert indices(found("some/where", streaming=True)) == BETTER


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rank", [[1, 2, 3], "first"])
def test_a_row_that_does_not_fit_is_skipped(rank, streaming, tmp_path):
    bad = {"prompt": "b", "image_path": ["0.png", "1.png"], "rank": rank}
    good = {"prompt": "p", "image_path": ["0.png", "1.png"], "rank": [1, 2]}
    write_lines(tmp_path, good, bad, good)
    results = found(tmp_path)
    kinds = [type(result) for result in results]
    assert kinds[0] is kinds[-1] is ImagePair
    assert set(kinds[1:-1]) == {Skipped}
    assert {r.reason for r in results[1:-1]} == {SkipReason.MALFORMED}


def test_a_third_image_without_a_number_is_refused_by_name(tmp_path):
    two = {"image1": "0.png", "image2": "1.png", "score1": 1, "score2": 2}
    write_lines(tmp_path, {"prompt": "p", **two, "image3": "2.png"})
    with pytest.raises(DataError, match=r"and image3 would be left out"):
        found(tmp_path)


def test_columns_that_nobody_reads_are_named(tmp_path):
    two = {"chosen": "0.png", "rejected": "1.png", "rejected_2": "2.png", "score": 4}
    write_lines(tmp_path, {"prompt": "p", **two})
    assert opened(tmp_path).summary.endswith("; not read: rejected_2, score")


def test_a_list_of_images_without_numbers_is_no_preference(tmp_path):
    write_lines(tmp_path, {"prompt": "p", "image": ["0.png", "1.png"]})
    with pytest.raises(DataError, match="no preference in the columns prompt, image"):
        found(tmp_path)


@pytest.mark.parametrize("buckets", [False, True])
def test_each_pair_is_trained_with_randomness_of_its_own(buckets, tmp_path):
    write_rows(tmp_path / "x.parquet", rows_of(2))
    source = open_source(tmp_path, pairs_per_device=4, buckets=buckets)
    batches = take(source, 3)
    assert len(set(ids(batches))) == 12
    assert len({seed for batch in batches for seed in batch.noise_seeds}) == 12


class _Numbers(AbstractRowStream):
    parts = (3,)

    def rows(self, part, start=None):
        for number in range(0 if start is None else start["n"], 3):
            yield (
                {"n": number},
                Row(f"r{number}", {"prompt": "p", "images": "abc", "rank": [1, 2, 3]}),
            )


def test_a_stream_resumes_within_a_row():
    columns = GroupColumns(prompt="prompt", images=("images",), scores=("rank",))
    stream = GroupStream(_Numbers(), columns)
    assert stream.parts == (3,)
    whole = list(stream.rows(0))
    assert len(whole) == 9
    for place, (cursor, _) in enumerate(whole):
        rest = list(stream.rows(0, json.loads(json.dumps(cursor))))
        assert [row.name for _, row in rest] == [row.name for _, row in whole[place:]]


def test_a_pair_next_to_lists_of_something_else_stays_a_pair():
    schema = Schema(("prompt", "chosen", "rejected", "tags"), frozenset({"tags"}))
    columns = recognise({}, schema, lower_is_better=None)
    assert columns is not None and columns.images == ("chosen", "rejected")


def test_lists_of_objects_with_an_image_and_its_number(tmp_path):
    items = [{"image": image, "rank": rank} for image, rank in zip(IMAGES, RANKS, strict=True)]
    write_rows(tmp_path / "a" / "x.parquet", [{"prompt": "p", "candidates": items}])
    assert indices(found(tmp_path / "a")) == BETTER
    items = [{"path": f"{i}.png", "score": -rank} for i, rank in enumerate(RANKS)]
    write_lines(tmp_path, {"prompt": "p", "images": items}, {"prompt": "q", "images": ["0.png"]})
    assert names(found(tmp_path / "x.jsonl")[:6]) == BETTER
    assert isinstance(found(tmp_path / "x.jsonl")[6], Skipped)
    own = {"prompt": "prompt", "images": "images.path", "scores": "images.score"}
    assert names(found(tmp_path / "x.jsonl", columns=own)[:6]) == BETTER


def test_images_in_a_list_of_structs_are_no_objects_with_numbers(tmp_path):
    write_rows(tmp_path / "x.parquet", [{"prompt": "p", "images": [{"bytes": IMAGES[0]}]}])
    with pytest.raises(DataError, match="Lists are held by images: one of images is read next to"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"caption": "p", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 1, "label_1": 0}, "jpg_2"),
        ({"caption": "p", "chosen": "0.png"}, "rejected_1"),
        ({"caption": "p", "image": "0.png"}, "rank"),
    ],
)
def test_an_image_that_would_be_left_out_is_refused_by_name(row, left_out, tmp_path):
    write_lines(tmp_path, {**row, left_out: "2.png"})
    with pytest.raises(DataError, match=f"and {left_out} would be left out"):
        found(tmp_path)


def test_what_the_datasets_library_saves_is_read(tmp_path):
    features = datasets.Features({"prompt": datasets.Value("string"), "chosen": datasets.Image()})
    rows = [{"prompt": "p", "chosen": {"bytes": IMAGES[0], "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    assert [pair.chosen for pair in found(tmp_path / "set")] == [IMAGES[0]]
    with pytest.raises(DataError, match=r"set data\.streaming to false"):
        found(tmp_path / "set", streaming=True)


def test_rows_of_one_image_that_make_up_a_ranking_are_refused_unless_named(tmp_path):
    rows = [
        {"prompt_id": 7, "prompt": "p", "image": f"{i}.png", "overall_rating": i} for i in (0, 1)
    ]
    write_lines(tmp_path, *rows)
    with pytest.raises(DataError, match="and prompt_id, overall_rating would be left out"):
        found(tmp_path)
    own = {"prompt": "prompt", "chosen": "image"}
    assert [pair.chosen.name for pair in found(tmp_path, columns=own)] == ["0.png", "1.png"]


@pytest.mark.parametrize("column", ["label", "is_preferred", "kto_tag"])
def test_single_images_that_are_labelled_are_not_all_preferred(column, tmp_path):
    write_lines(tmp_path, {"prompt": "p", "image": "0.png", column: False})
    with pytest.raises(DataError, match=f"and {column} would be left out"):
        found(tmp_path)


def test_images_as_lists_of_numbers_are_one_bad_row_not_a_pair_a_byte(tmp_path):
    row = {"prompt": "p", "chosen": [137, 80, 78], "rejected": [[[1, 2, 3]]]}
    write_lines(tmp_path, row)
    (pair,) = found(tmp_path)
    assert isinstance(pair, Skipped) and "chosen holds numbers" in pair.detail


def test_a_rank_below_zero_is_none(tmp_path):
    """As -1 is written for an image that nobody ranked, which would be the best of all."""
    write_lines(tmp_path, {"prompt": "p", "images": ["0.png", "1.png"], "rank": [1, -1]})
    assert all(isinstance(pair, Skipped) and "holds -1" in pair.detail for pair in found(tmp_path))
    write_lines(tmp_path, {"prompt": "p", "images": ["0.png", "1.png"], "score": [1, -1]})
    assert [pair.chosen.name for pair in found(tmp_path)] == ["0.png"]


def test_a_stream_says_about_how_many_pairs_it_has():
    columns = GroupColumns(prompt="prompt", images=("images",), scores=("rank",))
    stream = GroupStream(_Numbers(), columns)
    assert stream.about_rows is None  # nor does the stream of its rows say it
    assert [row.name for row in stream.only(["prompt"]).all_rows()] == [
        row.name for row in stream.all_rows()
    ]


def test_fronts_worked_by_hand():
    # c is beaten by a and b; a and b beat each other in one number each; d lacks one.
    points = [(3.0, 1.0), (1.0, 3.0), (0.5, 1.0), (9.0, None)]
    assert pareto_fronts(points) == ([0, 1], [2])
    assert pareto_fronts([(1.0,), (1.0,)]) == ([0, 1], [0, 1])  # neither beats the other
    assert pareto_fronts([(2.0, 5.0), (1.0, 5.0)]) == ([0], [1])
    assert pareto_fronts([]) == ([], [])


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_of_the_fronts_are_made_and_no_others(streaming, tmp_path):
    scores = {"score": [4.0, 3.0, 2.0, 1.0], "taste": [1.0, 2.0, 1.5, 0.5]}
    rows = [{key: value for key, value in row.items() if key != "rank"} for row in rows_of()]
    write_rows(tmp_path / "x.parquet", [{**row, **scores} for row in rows])
    strength = {"columns": {"taste": "taste"}, "target": {"labels": 1.0, "taste": 1.0}}
    settings = {"strength": StrengthConfig(**strength), "group_pairs": "fronts"}
    pairs = found(tmp_path, streaming=streaming, **settings)
    assert indices(pairs[:2]) == {(0, 3), (1, 3)} and len(pairs) == 6
    # A taste that counts the other way round: the last image is beaten by none, and beats none.
    strength["target"] = {"labels": 1.0, "taste": -1.0}
    settings["strength"] = StrengthConfig(**strength)
    turned = found(tmp_path, streaming=streaming, **settings)
    assert indices(turned[:5]) == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)} and len(turned) == 15


def test_ranks_are_lower_the_better_on_fronts_too(tmp_path):
    write_rows(tmp_path / "x.parquet", rows_of(1))
    settings = {"strength": StrengthConfig(target={"labels": 1.0}), "group_pairs": "fronts"}
    assert indices(found(tmp_path, **settings)) == {(1, 2)}  # ranks 1 and 4


@pytest.mark.parametrize(
    ("rows", "target", "message"),
    [
        (rows_of(1), {}, "those of the numbers of data.strength.target, and there are none"),
        (
            [{"prompt": "a", "chosen": IMAGES[0], "rejected": IMAGES[1]}],
            {},
            "has no rows of several images with scores",
        ),
    ],
)
def test_fronts_without_groups_or_numbers_are_refused(rows, target, message, tmp_path):
    write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, strength=StrengthConfig(target=target), group_pairs="fronts")
