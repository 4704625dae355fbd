import json
from collections import Counter
from dataclasses import replace

import datasets
import pytest

from diffalign.data.layout import Layout
from diffalign.data.tables import HubStream
from diffalign.errors import ConfigError, DataError
from tests.data.conftest import open_source, take
from tests.layouts import WRITERS, make_pairs, pickapic_rows, write_pickapic, write_rows
from tests.worlds import MOVED, ON_TWO, samples_of_steps

KINDS = {
    "indexed": {},
    "buckets": {"buckets": True, "resolution": 32},
    "streamed": {"streaming": True, "shuffle_block": 5},
    "broken": {"max_bad_fraction": 0.5},
    "broken stream": {"max_bad_fraction": 0.5, "streaming": True, "shuffle_block": 5},
}


def write(folder, kind):
    """Thirteen pairs, two of which cannot be used where the kind says so; two shapes."""
    shapes = [(32, 32)] * 8 + [(52, 32)] * 5
    made = [make_pairs(i + 1, size=size)[i] for i, size in enumerate(shapes)]
    rows = pickapic_rows(made)
    if kind.startswith("broken"):
        rows[2]["jpg_0"] = b"garbage"
        rows[7]["caption"] = ""
    write_rows(folder / "x.parquet", rows, row_group_size=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", MOVED)
def test_a_step_sees_the_same_samples_on_any_number_of_processes(
    kind, moved, tmp_path, monkeypatch
):
    write(tmp_path, kind)

    def see(stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: open_source(tmp_path, layout=layout, **KINDS[kind]),
            stages,
            accumulation=4,
            names=lambda batch: list(zip(batch.sample_ids, batch.noise_seeds, strict=True)),
        )

    expected = see(ON_TWO)
    assert see(MOVED[moved]) == expected
    assert len(Counter(name for step in expected for name, _ in step)) > 8


def test_every_global_micro_batch_is_of_one_bucket_wherever_it_is_cut(tmp_path, as_rank):
    write(tmp_path, "buckets")
    as_rank(0, 2)
    start = Layout.start(samples_per_device=2, accumulation=4)
    as_rank(0, 4)
    layout = start.on_these_processes(1)
    shapes: dict[int, set[tuple[int, int]]] = {}
    for rank in range(4):
        as_rank(rank, 4)
        batches = take(open_source(tmp_path, layout=layout, **KINDS["buckets"]), 12)
        for part, batch in zip(layout.own_parts(0), batches, strict=False):
            shapes.setdefault(layout.place(part.start)[0], set()).add(batch.size)
    assert len(shapes) == 12
    assert all(len(found) == 1 for found in shapes.values())
    assert len(set().union(*shapes.values())) == 2


@pytest.mark.parametrize("kind", ["indexed", "streamed"])
def test_a_position_counts_the_samples_of_all_ranks(kind, tmp_path, as_rank):
    write(tmp_path, kind)
    as_rank(1, 2)
    source = open_source(tmp_path, pairs_per_device=3, **KINDS[kind])
    take(source, 4)
    state = json.loads(json.dumps(source.state_dict()))
    assert (state["samples"], state["pairs_per_micro_batch"]) == (24, 6)


def test_a_position_of_an_older_checkpoint_is_read(tmp_path):
    write(tmp_path, "indexed")
    source = open_source(tmp_path, pairs_per_device=3)
    whole = take(source, 7)
    resumed = open_source(tmp_path, pairs_per_device=3)
    resumed.load_state_dict({"pairs_per_micro_batch": 3, "pairs": 13, "micro_batches": 4})
    assert [b.sample_ids for b in take(resumed, 3)] == [b.sample_ids for b in whole[4:]]
    assert resumed.state_dict() == source.state_dict()


@pytest.mark.parametrize("kind", ["indexed", "streamed"])
def test_other_global_micro_batches_are_refused(kind, tmp_path):
    write(tmp_path, kind)
    state = open_source(tmp_path, pairs_per_device=2, **KINDS[kind]).state_dict()
    with pytest.raises(
        DataError, match=r"micro-batches of 2 samples, and those of this run have 3, .*resume with"
    ):
        open_source(tmp_path, pairs_per_device=3, **KINDS[kind]).load_state_dict(state)


def test_a_run_starts_with_as_many_samples_as_its_processes_take_at_once(as_rank):
    as_rank(1, 3)
    layout = Layout.start(samples_per_device=2, accumulation=4)
    assert (layout.micro_batch, layout.samples_per_step, layout.accumulation) == (6, 24, 4)


def test_fewer_processes_do_more_forward_passes_and_more_do_fewer(as_rank):
    as_rank(0, 4)
    start = Layout.start(samples_per_device=2, accumulation=4)
    as_rank(0, 1)
    assert start.on_these_processes(2).accumulation == 16
    as_rank(0, 8)
    assert start.on_these_processes(2).accumulation == 2
    assert start.on_these_processes(1).accumulation == 4
    assert start.on_these_processes(2).samples_per_step == start.samples_per_step


def test_processes_that_cannot_share_a_step_are_refused(as_rank):
    as_rank(0, 4)
    start = Layout.start(samples_per_device=2, accumulation=2)
    as_rank(0, 3)
    with pytest.raises(
        ConfigError, match=r"16 samples, 8 forward passes of 2, and 3 processes .* 1, 2, 4, 8 proc"
    ):
        start.on_these_processes(2)
    with pytest.raises(ConfigError, match=r"samples_per_device is 3, .* divisor of that, such as"):
        start.on_these_processes(3)


def test_processes_that_could_share_smaller_forward_passes_are_told_so(as_rank):
    as_rank(0, 2)
    start = Layout.start(samples_per_device=4, accumulation=1)
    as_rank(0, 4)
    with pytest.raises(ConfigError, match=r"or training\.samples_per_device=2"):
        start.on_these_processes(4)


def test_parts_of_all_ranks_are_the_whole_sequence(as_rank):
    as_rank(0, 3)
    layout = Layout.start(samples_per_device=2, accumulation=2)
    seen = []
    for rank in range(3):
        as_rank(rank, 3)
        seen += [sample for part in layout.own_parts_of(12, 36) for sample in part]
    assert sorted(seen) == list(range(12, 36))


@pytest.mark.parametrize("kind", sorted(set(WRITERS) - {"folder", "jsonl"}))
def test_every_streamed_format_is_seen_alike_on_other_processes(kind, tmp_path, monkeypatch):
    WRITERS[kind](tmp_path, make_pairs(9))

    def see(stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: open_source(tmp_path, layout=layout, streaming=True, shuffle_block=4),
            stages,
            accumulation=2,
        )

    assert see(MOVED["to four and back"]) == see(ON_TWO)


def test_shards_of_the_hub_are_seen_alike_on_other_processes(tmp_path, monkeypatch):
    write_pickapic(tmp_path, make_pairs(40), files=4)
    files = [str(file) for file in sorted(tmp_path.rglob("*.parquet"))]
    load = datasets.load_dataset

    def load_local(path, split, revision, streaming):
        return load("parquet", data_files=files, split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    opened: list[int] = []
    rows = HubStream.rows

    def noted(stream, part, start=None):
        opened.append(part)
        return rows(stream, part, start)

    monkeypatch.setattr(HubStream, "rows", noted)

    def see(stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: open_source("some/where", layout=layout, streaming=True),
            stages,
            accumulation=2,
        )

    expected = see((replace(ON_TWO[0], steps=4),))
    assert sorted(opened) == [0, 1, 2, 3]  # two by each rank
    assert see([replace(stage, steps=2) for stage in MOVED["to four"]]) == expected
