import dataclasses
import json
import multiprocessing
import os
import signal

import pytest
import torch

from diffalign.errors import DataError
from diffalign.seeding import derive_seed
from diffalign.timesteps import TimestepSampling
from tests.data.conftest import ids, open_source, take
from tests.layouts import (
    WINNER_WRITERS,
    WRITERS,
    encoded,
    make_pairs,
    pickapic_rows,
    solid_image,
    write_jsonl,
    write_pickapic,
    write_rows,
    write_winning_rows,
)
from tests.worlds import states_of_ranks

RED, BLUE = 0, 2


def same(first, second):
    """Whether two batches agree in every field."""
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            one, two = one.tolist(), two.tolist()
        elif isinstance(one, dict):
            one = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in one.items()}
            two = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in two.items()}
        if one != two:
            return False
    return True


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_gives_the_same_pairs(kind, tmp_path):
    WRITERS[kind](tmp_path, make_pairs(6))
    source = open_source(tmp_path, pairs_per_device=6, caption_dropout=0.0)
    (batch,) = take(source, 1)
    assert sorted(batch.prompts) == [f"a red thing, number {i}" for i in range(6)]
    assert len(set(batch.sample_ids)) == 6
    for view, colour, other in [("chosen", RED, BLUE), ("rejected", BLUE, RED)]:
        images = batch.images[view]
        assert images.shape == (6, 3, 16, 16)
        assert images.dtype == torch.float32
        assert images[:, colour].mean() > -0.8
        assert (images[:, other] == -1.0).all()
        assert batch.original_sizes[view].tolist() == [[32, 32]] * 6
        assert batch.crop_corners[view].tolist() == [[0, 0]] * 6
    assert ((batch.timesteps >= 0) & (batch.timesteps < 1000)).all()


@pytest.mark.parametrize("kind", WRITERS)
def test_sample_ids_do_not_depend_on_where_the_data_lies(kind, tmp_path):
    found = []
    for place in ("here", "there"):
        WRITERS[kind](tmp_path / place, make_pairs(4))
        found.append(ids(take(open_source(tmp_path / place), 2)))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["pickapic", "parquet"])
def test_streamed_and_random_reading_give_the_same_samples(kind, tmp_path):
    WRITERS[kind](tmp_path, make_pairs(6))
    batches = [
        take(open_source(tmp_path, pairs_per_device=6, streaming=streaming), 1)[0]
        for streaming in (False, True)
    ]
    rows = [
        sorted(zip(b.sample_ids, b.prompts, b.timesteps.tolist(), b.noise_seeds, strict=True))
        for b in batches
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(streaming, tmp_path):
    write_pickapic(tmp_path, make_pairs(7), files=2)
    alone = take(open_source(tmp_path, streaming=streaming, shuffle_block=3), 5)
    helped = take(open_source(tmp_path, streaming=streaming, shuffle_block=3, workers=2), 5)
    assert all(same(a, h) for a, h in zip(alone, helped, strict=True))


@pytest.mark.parametrize("kind", ["pickapic", "webdataset", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_source_goes_on_where_the_trainer_was(kind, workers, tmp_path):
    """Workers have read ahead by then; only what was handed out counts."""
    settings = {"shuffle_block": 3, "workers": workers, "streaming": kind == "stream"}
    write = WRITERS["pickapic" if kind == "stream" else kind]
    write(tmp_path, make_pairs(8))
    whole = take(open_source(tmp_path, **settings), 11)
    for stop in (1, 4, 6) if workers == 0 else (4,):
        source = open_source(tmp_path, **settings)
        take(source, stop)
        state = json.loads(json.dumps(source.state_dict()))
        resumed = open_source(tmp_path, **settings)
        resumed.load_state_dict(state)
        rest = take(resumed, 11 - stop)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_of_n_see_what_one_of_2n_sees(streaming, tmp_path, as_rank, monkeypatch):
    write_pickapic(tmp_path, make_pairs(7))
    settings = {"streaming": streaming, "shuffle_block": 3}
    alone = take(open_source(tmp_path, pairs_per_device=4, **settings), 4)
    sources, parts = [], []
    for rank in range(2):
        as_rank(rank, 2)
        sources.append(open_source(tmp_path, pairs_per_device=2, **settings))
        parts.append(take(sources[-1], 4))
    states = states_of_ranks(monkeypatch, sources)
    assert states[0] == states[1]
    for whole, first, second in zip(alone, *parts, strict=True):
        assert whole.sample_ids == first.sample_ids + second.sample_ids
        assert whole.noise_seeds == first.noise_seeds + second.noise_seeds
        images = torch.cat([first.images["chosen"], second.images["chosen"]])
        assert torch.equal(whole.images["chosen"], images)


def test_a_data_set_smaller_than_the_batch_wraps_with_new_samples(tmp_path):
    write_pickapic(tmp_path, make_pairs(3))
    (batch,) = take(open_source(tmp_path, pairs_per_device=6), 1)
    assert sorted(batch.sample_ids[:3]) == sorted(batch.sample_ids[3:])
    assert len(set(batch.noise_seeds)) == 6


def test_timestep_and_seeds_are_functions_of_run_seed_sample_and_visit(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    first, second = take(open_source(tmp_path, run_seed=5), 2)
    for visit, batch in enumerate((first, second)):
        for i, name in enumerate(batch.sample_ids):
            expected = TimestepSampling().sample(5, name, visit, schedule_length=1000)
            assert batch.timesteps[i].item() == expected
            assert batch.noise_seeds[i] == derive_seed(5, name, visit, "noise")
            assert batch.encoding_seeds["chosen"][i] != batch.encoding_seeds["rejected"][i]


def test_captions_are_dropped_for_the_pair_at_the_configured_rate(tmp_path):
    write_pickapic(tmp_path, make_pairs(50))
    source = open_source(tmp_path, pairs_per_device=50, caption_dropout=0.3)
    dropped = [prompt == "" for batch in take(source, 8) for prompt in batch.prompts]
    assert 0.2 < sum(dropped) / len(dropped) < 0.4


def test_both_sides_are_mirrored_and_cropped_together(tmp_path):
    image = solid_image((250, 250, 250), size=(48, 16))
    rows = pickapic_rows(make_pairs(12))
    same_twice = {"jpg_0": encoded(image), "jpg_1": encoded(image)}
    write_rows(tmp_path / "x.parquet", [{**row, **same_twice} for row in rows])
    (batch,) = take(open_source(tmp_path, pairs_per_device=12, crop="random"), 1)
    chosen, rejected = (batch.images[view] for view in ("chosen", "rejected"))
    assert torch.equal(chosen, rejected)
    assert torch.equal(*(batch.crop_corners[view] for view in ("chosen", "rejected")))
    rising = chosen[:, 0, 0, -1] > chosen[:, 0, 0, 0]
    assert 0 < rising.sum() < 12
    assert len({tuple(corner) for corner in batch.crop_corners["chosen"].tolist()}) > 5


def test_flips_can_be_turned_off(tmp_path):
    write_pickapic(tmp_path, make_pairs(12))
    (batch,) = take(open_source(tmp_path, pairs_per_device=12, flip=False), 1)
    assert (batch.images["chosen"][:, 0, 0, -1] > batch.images["chosen"][:, 0, 0, 0]).all()


def test_one_view_is_enough_where_one_is_asked_for(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    source = open_source(tmp_path, views=frozenset({"chosen"}))
    (batch,) = take(source, 1)
    assert source.views == {"chosen"}
    assert set(batch.images) == set(batch.encoding_seeds) == {"chosen"}


@pytest.mark.parametrize("kind", WINNER_WRITERS)
def test_preferred_images_alone_are_read_from_every_layout(kind, tmp_path):
    WINNER_WRITERS[kind](tmp_path, make_pairs(4))
    source = open_source(tmp_path, pairs_per_device=4, views=frozenset({"chosen"}))
    (batch,) = take(source, 1)
    assert sorted(batch.captions) == [f"a red thing, number {i}" for i in range(4)]
    assert batch.images["chosen"][:, RED].mean() > -0.8
    assert set(batch.images) == {"chosen"}
    assert f"read by {kind}" in source.describe()[0]
    (row,) = source.preview(1).rows
    assert (row.chosen, row.rejected) == ((32, 32), None)


def test_preferred_images_alone_may_go_into_buckets(tmp_path):
    write_winning_rows(tmp_path, make_pairs(4, size=(64, 32)))
    source = open_source(tmp_path, views=frozenset({"chosen"}), buckets=True)
    assert take(source, 1)[0].images["chosen"].shape == (2, 3, 8, 24)


@pytest.mark.parametrize("kind", WINNER_WRITERS)
def test_preferred_images_alone_make_no_pairs(kind, tmp_path):
    WINNER_WRITERS[kind](tmp_path, make_pairs(2))
    with pytest.raises(DataError, match=r"every image is a preferred one.*needs chosen and rej"):
        open_source(tmp_path)


def test_a_dropped_caption_is_still_known(tmp_path):
    write_pickapic(tmp_path, make_pairs(4))
    (batch,) = take(open_source(tmp_path, pairs_per_device=4, caption_dropout=1.0), 1)
    assert batch.prompts == ("",) * 4
    assert sorted(batch.captions) == [f"a red thing, number {i}" for i in range(4)]


def test_a_view_that_pairs_do_not_have_is_refused(tmp_path):
    write_pickapic(tmp_path, make_pairs(2))
    with pytest.raises(DataError, match="pairs offer the views chosen, rejected, and the"):
        open_source(tmp_path, views=frozenset({"desirable"}))


def test_the_global_random_state_is_left_alone(tmp_path):
    write_pickapic(tmp_path, make_pairs(4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(open_source(tmp_path, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def broken_set(folder, count=8):
    """Rows 1, 2 and 5 have one image that cannot be used, row 3 has no caption."""
    rows = pickapic_rows(make_pairs(count))
    rows[1]["jpg_0"] = b"garbage"
    rows[2]["jpg_1"] = b""
    rows[3]["caption"] = " "
    rows[5]["jpg_1"] = None
    write_rows(folder / "x.parquet", rows)
    return folder


BROKEN = {"1001", "1002", "1003", "1005"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_replaced_counted_and_listed_once(streaming, workers, tmp_path):
    broken_set(tmp_path / "set")
    path = tmp_path / "run" / "skipped.jsonl"
    source = open_source(
        tmp_path / "set", skipped=path, max_bad_fraction=0.5, streaming=streaming, workers=workers
    )
    batches = take(source, 12)
    assert all(len(batch) == 2 for batch in batches)
    assert not BROKEN & {name.split("-")[0] for name in ids(batches)}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    listed = {line["sample_id"].split("-")[0]: (line["reason"], line["side"]) for line in lines}
    assert len(lines) == 4
    assert listed == {
        "1001": ("corrupt image", "rejected"),
        "1002": ("zero-size image", "rejected"),
        "1003": ("empty caption", None),
        "1005": ("missing image", "chosen"),
    }
    assert source.skipped_counts == {
        "corrupt image": 1,
        "zero-size image": 1,
        "empty caption": 1,
        "missing image": 1,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_replacements_do_not_depend_on_ranks(streaming, tmp_path, as_rank):
    broken_set(tmp_path)
    settings = {"max_bad_fraction": 0.5, "streaming": streaming}
    alone = take(open_source(tmp_path, pairs_per_device=4, **settings), 4)
    as_rank(1, 2)
    second = take(open_source(tmp_path, pairs_per_device=2, **settings), 4)
    assert [batch.sample_ids[2:] for batch in alone] == [batch.sample_ids for batch in second]


def test_too_many_bad_rows_stop_the_run_with_the_list(tmp_path):
    broken_set(tmp_path / "set")
    path = tmp_path / "skipped.jsonl"
    source = open_source(tmp_path / "set", skipped=path, max_bad_fraction=0.3)
    with pytest.raises(DataError) as error:
        take(source, 12)
    message = str(error.value)
    assert "3 of 8 pairs cannot be used, more than data.max_bad_fraction = 0.3 allows" in message
    assert "(empty caption: " in message
    assert str(path) in message


def test_too_many_empty_captions_stop_before_the_first_image(tmp_path):
    rows = [{**row, "caption": ""} for row in pickapic_rows(make_pairs(3))]
    write_rows(tmp_path / "x.parquet", rows + pickapic_rows(make_pairs(3)))
    with pytest.raises(DataError, match="3 of 6 pairs cannot be used"):
        open_source(tmp_path)


def with_ties(folder):
    """Row 0 is a tie, row 4 has no label."""
    rows = pickapic_rows(make_pairs(6))
    rows[0].update(label_0=0.5, label_1=0.5)
    rows[4].update(has_label=False)
    write_rows(folder / "x.parquet", rows)
    return folder


def test_ties_and_unlabelled_rows_are_counted_and_left_out(tmp_path):
    source = open_source(with_ties(tmp_path))
    assert source.describe()[1] == "6 rows: 4 pairs, 1 left out (tie), 1 left out (no label)"
    assert len(set(ids(take(source, 2)))) == 4
    assert source.skipped_counts == {}
    assert source.left_out_counts == {"tie": 1, "no label": 1}


def test_the_end_of_a_run_says_what_was_left_out_and_what_was_skipped(tmp_path):
    rows = pickapic_rows(make_pairs(6))
    rows[0].update(label_0=0.5, label_1=0.5)
    rows[2]["jpg_0"] = b"garbage"
    write_rows(tmp_path / "set" / "x.parquet", rows)
    path = tmp_path / "skipped.jsonl"
    settings = {"streaming": True, "max_bad_fraction": 0.5, "skipped": path}
    source = open_source(tmp_path / "set", **settings)
    assert source.describe_end() == []
    take(source, 6)
    assert source.describe_end() == [
        "rows left out, without a preference: 1 tie",
        f"pairs skipped as unusable: 1 corrupt image, listed in {path}",
    ]


def test_ties_of_a_stream_are_counted_as_they_pass_and_once(tmp_path):
    settings = {"streaming": True, "shuffle_block": 3, "pairs_per_device": 1}
    source = open_source(with_ties(tmp_path), **settings)
    take(source, 1)
    assert source.left_out_counts == {"tie": 1}
    resumed = open_source(tmp_path, **settings)
    resumed.load_state_dict(source.state_dict())
    take(resumed, 9)
    assert resumed.left_out_counts == {"tie": 1, "no label": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_ties_is_refused(streaming, tmp_path):
    rows = [{**row, "label_0": 0.5, "label_1": 0.5} for row in pickapic_rows(make_pairs(3))]
    write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match=r"there is nothing to train on in .*3 left out \(tie\)"):
        take(open_source(tmp_path, streaming=streaming), 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_limit_takes_the_first_pairs(streaming, tmp_path):
    write_pickapic(tmp_path, make_pairs(9))
    source = open_source(tmp_path, limit=4, streaming=streaming, shuffle_block=3)
    found = ids(take(source, 6))
    assert {name.split("-")[0] for name in found} == {"1000", "1001", "1002", "1003"}
    assert sorted(found[:4]) == sorted(found[4:8])


def test_resuming_with_another_global_batch_is_refused(tmp_path):
    write_pickapic(tmp_path, make_pairs(4))
    state = open_source(tmp_path, pairs_per_device=2).state_dict()
    with pytest.raises(DataError, match="micro-batches of 2 samples, and those of this run have 3"):
        open_source(tmp_path, pairs_per_device=3).load_state_dict(state)


@pytest.mark.parametrize("kind", WRITERS)
def test_moved_data_has_the_same_fingerprint_and_other_data_another(kind, tmp_path):
    for folder, count in (("here", 3), ("there", 3), ("other", 4)):
        WRITERS[kind](tmp_path / folder, make_pairs(count))
    here, there, other = (
        open_source(tmp_path / folder).fingerprint() for folder in ("here", "there", "other")
    )
    assert here == there != other


def test_a_file_of_another_size_changes_the_fingerprint(tmp_path):
    WRITERS["folder"](tmp_path, make_pairs(2))
    before = open_source(tmp_path).fingerprint()
    image = next((tmp_path / "win").glob("*.png"))
    image.write_bytes(image.read_bytes() + b"x")
    assert open_source(tmp_path).fingerprint() != before


def test_resuming_with_other_data_is_refused(tmp_path):
    for count in (4, 5):
        write_pickapic(tmp_path / str(count), make_pairs(count))
    state = open_source(tmp_path / "4").state_dict()
    with pytest.raises(DataError, match="written with 4 usable pairs, and the data set has 5 now"):
        open_source(tmp_path / "5").load_state_dict(state)


def test_resuming_a_stream_at_random_is_refused(tmp_path):
    write_pickapic(tmp_path, make_pairs(4))
    streamed, random = open_source(tmp_path, streaming=True), open_source(tmp_path)
    for one, other in ((streamed, random), (random, streamed)):
        with pytest.raises(DataError, match=r"set data.streaming as it was"):
            one.load_state_dict(other.state_dict())


def test_a_stretch_of_a_stream_without_any_usable_pair_is_listed_too(tmp_path):
    rows = pickapic_rows(make_pairs(12))
    for row in rows[4:8]:
        row["caption"] = ""
    write_rows(tmp_path / "x.parquet", rows)
    settings = {"streaming": True, "shuffle_block": 4, "max_bad_fraction": 0.5}
    source = open_source(tmp_path, **settings)
    take(source, 3)
    assert source.skipped_counts == {"empty caption": 4}


def test_workers_leave_ctrl_c_to_the_trainer(tmp_path):
    write_pickapic(tmp_path, make_pairs(4))
    others = multiprocessing.active_children()
    batches = iter(open_source(tmp_path, workers=1))
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(8):
        assert len(next(batches)) == 2
    assert all(worker.is_alive() for worker in workers)


BAD_ROWS = {
    "a number as an image": {"chosen": 7},
    "NUL in a path": {"chosen": "a\0.png"},
    "a label of 400 digits": {"score1": 10**400},
    "a broken PNG": {"rejected": "broken.png"},
    "a null caption": {"prompt": None},
    "a missing image": {"rejected": "gone.png"},
    "an object as an image": {"chosen": {"url": "x"}},
}


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_one_bad_row_is_listed_and_ends_no_run(bad, buckets, tmp_path):
    write_jsonl(tmp_path, make_pairs(4))
    file = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if "score1" in bad:
        rows = [{**r, "score1": 2, "score2": 1} for r in rows]
        names = {"chosen": "image1", "rejected": "image2"}
        rows = [{names.get(name, name): value for name, value in r.items()} for r in rows]
    rows[2] |= bad
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.png").write_bytes(make_pairs(1)[0].chosen[:20])
    source = open_source(tmp_path, max_bad_fraction=0.5, buckets=buckets)
    seen = ids(take(source, 6))
    assert set(seen) == {"pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:4"}
    assert sum(source.skipped_counts.values()) == 1
