import pytest

from diffalign.data.lanes import cut_into_lanes, deal, lane_of, taken_from
from diffalign.data.layout import Layout


def test_a_part_goes_to_the_lane_with_the_least():
    assert deal([5, 2, 2, 2, 4], 2) == [[0, 4], [1, 2, 3]]
    assert deal([2, 2, 2, 2], 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("micro_batch", "micro_batches", "parts", "cut"),
    [
        (1, 1, 100, (1, 1)),
        (8, 1, 100, (8, 1)),
        (8, 1, 4, (4, 2)),
        (8, 1, 5, (1, 8)),
        (2, 12, 240, (24, 1)),  # the lanes of a step of 24 samples
        (2, 12, 100, (8, 1)),  # 24 of them would be of four parts or five
        (80, 1, 80, (20, 4)),  # and not 16, which five processes could not share
        (64, 32, 1000, (32, 2)),
        (7, 1, 4, (1, 7)),
        (8, 1, 0, (1, 8)),
    ],
)
def test_lanes_follow_from_the_step_and_the_parts(micro_batch, micro_batches, parts, cut):
    layout = Layout(samples_per_device=1, micro_batch=micro_batch, micro_batches=micro_batches)
    assert cut_into_lanes(layout, [1] * parts) == cut


@pytest.mark.parametrize(
    ("processes", "held_mb", "lanes"),
    [(1, 500, 1), (1, 100, 4), (4, 500, 4), (5, 500, 5), (5, 1, 20), (8, 500, 8), (1, 1, 20)],
)
def test_parts_that_take_much_memory_make_few_lanes(processes, held_mb, lanes, as_rank):
    as_rank(0, processes)
    layout = Layout(samples_per_device=1, micro_batch=40, micro_batches=1)
    assert cut_into_lanes(layout, [1] * 80, held_bytes=held_mb * 10**6)[0] == lanes


@pytest.mark.parametrize(("lanes", "turn"), [(1, 1), (3, 2), (8, 1), (4, 5)])
def test_every_lane_gives_its_samples_in_turn_and_none_twice(lanes, turn):
    taken = [0] * lanes
    for sample in range(100):
        assert [taken_from(sample, lane, lanes, turn) for lane in range(lanes)] == taken
        rounds, (lane, within) = lane_of(sample, lanes, turn)
        assert rounds * turn + within == taken[lane]
        taken[lane] += 1
