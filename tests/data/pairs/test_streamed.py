from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from diffalign.data.layout import Layout
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs, open_data
from diffalign.data.pairs.streamed import StreamPlan
from diffalign.data.rows import AbstractRowStream, Row
from diffalign.errors import DataError
from tests.layouts import make_pairs, pickapic_rows, write_rows

TWO = Layout(samples_per_device=2, micro_batch=2, micro_batches=1)


class CountedStream(AbstractRowStream):
    """Rows 0 to n - 1 in parts of so many, that say how many have been read."""

    parts = ()

    def __init__(self, *counts):
        self.parts = counts
        self.read = 0
        self.opened = set()

    def rows(self, part, start=None):
        self.opened.add(part)
        first = sum(self.parts[:part])
        for number in range(start["row"] if start else first, first + self.parts[part]):
            self.read += 1
            yield {"row": number}, Row(f"{number}", {"p": "p", "a": b"a", "b": b"b"})


def plan_over(stream, block_rows=4, run_seed=0, limit=None):
    columns = PairColumns(prompt="p", images=("a", "b"))
    data = OpenedPairs(rows=stream, columns=columns, base=None, summary="", fingerprint="")
    return StreamPlan(data, run_seed=run_seed, block_rows=block_rows, limit=limit, target=(8, 8))


def names(batches):
    return [int(work.pair.sample_id) for batch in batches for work in batch.works]


def planned(plan, count, position=None):
    return list(islice(plan.batches(position or plan.start(TWO), TWO), count))


def test_a_block_is_shuffled_within_itself_and_the_short_end_with_its_neighbour():
    found = names(planned(plan_over(CountedStream(14)), 14))
    for epoch in (found[:14], found[14:]):
        assert sorted(epoch[:4]) == [0, 1, 2, 3]
        assert sorted(epoch[4:8]) == [4, 5, 6, 7]
        assert sorted(epoch[8:]) == list(range(8, 14))
    assert found[:14] != sorted(found[:14])
    assert found[:14] != found[14:]


def test_the_sample_is_the_epoch():
    batches = planned(plan_over(CountedStream(6)), 6)
    assert [work.visit for batch in batches for work in batch.works] == [0] * 6 + [1] * 6


def test_another_seed_is_another_order():
    orders = [names(planned(plan_over(CountedStream(14), run_seed=s), 7)) for s in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("stop", range(1, 12))
def test_any_position_resumes(stop):
    plan = plan_over(CountedStream(10))
    whole = planned(plan, 14)
    rest = planned(plan_over(CountedStream(10)), 14 - stop, whole[stop - 1].after)
    assert names(rest) == names(whole[stop:])
    assert [batch.after for batch in rest] == [batch.after for batch in whole[stop:]]


def test_resuming_reads_nothing_before_the_block():
    position = planned(plan_over(CountedStream(100)), 40)[-1].after
    stream = CountedStream(100)
    planned(plan_over(stream), 1, position)
    assert stream.read <= 3 * 4


def test_no_more_than_a_few_blocks_are_read_ahead():
    stream = CountedStream(10_000)
    plan = plan_over(stream)
    for used, _ in enumerate(islice(plan.batches(plan.start(TWO), TWO), 200)):
        assert stream.read <= 2 * (used + 1) + 3 * 4


def test_the_share_of_bad_pairs_is_taken_of_those_met_but_of_1000_at_least():
    batches = planned(plan_over(CountedStream(3000), block_rows=500), 1600)
    assert batches[0].out_of == 1000
    assert batches[749].out_of == 1500
    assert batches[-1].out_of == 3000  # in the second epoch there are not more


EIGHT = Layout(samples_per_device=2, micro_batch=4, micro_batches=2)
"""Of a run that starts on two processes."""


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_rank_reads_its_own_parts_alone(size, as_rank):
    opened = []
    for rank in range(size):
        as_rank(rank, size)
        stream = CountedStream(*[9] * 16)
        plan, layout = plan_over(stream), EIGHT.on_these_processes(min(2, 8 // size))
        assert len(names(islice(plan.batches(plan.start(layout), layout), 20))) >= 20
        opened.append(stream.opened)
    assert sum(len(parts) for parts in opened) == 16
    assert set().union(*opened) == set(range(16))


@pytest.mark.parametrize("stop", range(1, 12))
def test_any_position_in_lanes_resumes_without_reading_what_came_before(stop):
    def plan():
        return plan_over(CountedStream(*[20] * 8), block_rows=128)

    whole = planned_eight(plan(), 14, plan().start(EIGHT))
    resumed = plan()
    rest = planned_eight(resumed, 14 - stop, whole[stop - 1].after)
    assert names(rest) == names(whole[stop:])
    assert [batch.after for batch in rest] == [batch.after for batch in whole[stop:]]


def planned_eight(plan, count, position):
    return list(islice(plan.batches(position, EIGHT), count))


def test_resuming_in_lanes_opens_no_part_that_is_used_up():
    stream = CountedStream(*[16] * 32)  # eight lanes of four parts
    position = planned_eight(plan_over(stream), 120, plan_over(stream).start(EIGHT))[-1].after
    again = CountedStream(*[16] * 32)
    planned_eight(plan_over(again), 4, position)
    assert min(again.opened) >= 8
    assert again.read <= 8 * 3 * 16


def test_lanes_of_unequal_length_start_anew_each_by_itself():
    works = [w for batch in planned(plan_over(CountedStream(20, 22)), 22) for w in batch.works]
    short, long = works[0::2], works[1::2]
    assert [work.visit for work in short] == [0] * 20 + [1] * 2
    assert sorted(int(work.pair.sample_id) for work in long) == list(range(20, 42))


def test_lanes_are_never_much_longer_than_others():
    assert len(plan_over(CountedStream(20, 22)).start(TWO)["lanes"]) == 2
    assert len(plan_over(CountedStream(20, 23)).start(TWO)["lanes"]) == 1


def test_a_limit_leaves_one_lane_and_takes_the_first_pairs():
    plan = plan_over(CountedStream(4, 4, 4), limit=6)
    assert len(plan.start(EIGHT)["lanes"]) == 1
    assert set(names(planned_eight(plan, 6, plan.start(EIGHT)))) == set(range(6))


def test_a_lane_without_a_pair_is_refused():
    class HalfEmpty(CountedStream):
        def rows(self, part, start=None):
            return super().rows(part, start) if part == 0 else iter(())

    with pytest.raises(DataError, match=r"in lane 2 of 2 of : no rows\. Every lane needs a pair"):
        planned(plan_over(HalfEmpty(4, 4)), 1)


def test_positions_of_other_readers_are_refused():
    plan = plan_over(CountedStream(4, 4))
    with pytest.raises(DataError, match=r"a random order, .* set data\.streaming as it was"):
        plan.check({"samples": 4, "pairs": 8})
    with pytest.raises(DataError, match=r"read in one lane, .* or start a new run from its export"):
        plan.check({"epoch": 0, "block": 3, "cursor": None, "offset": 1})
    with pytest.raises(DataError, match=r"2 parts .*, and the data set has 3 now"):
        plan_over(CountedStream(4, 4, 4)).check(plan.start(TWO))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_stays_flat_over_a_long_stream(tmp_path):
    """120 MB of images pass through; no more than 40 MB stay."""
    rows = pickapic_rows(make_pairs(300))
    random = np.random.default_rng(0)
    for row in rows:
        row.update(jpg_0=random.bytes(200_000), jpg_1=random.bytes(200_000))
    write_rows(tmp_path / "x.parquet", rows, row_group_size=8)
    del rows
    data = open_data(PairConfig(path=str(tmp_path), resolution=16, streaming=True))
    plan = StreamPlan(data, run_seed=0, block_rows=8, limit=None, target=(16, 16))
    one = Layout.start(samples_per_device=1, accumulation=1)
    batches = plan.batches(plan.start(one), one)
    next(batches)
    before = peak = resident_bytes()
    for _ in islice(batches, 299):
        peak = max(peak, resident_bytes())
    assert peak - before < 40_000_000
