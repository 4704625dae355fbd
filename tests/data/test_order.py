from collections import Counter

import numpy as np

from diffalign.data.order import Order


def order(count=10, seed=0):
    return Order(seed, [np.arange(count)])


def members(positions):
    return [position_.member for position_ in positions]


def test_every_epoch_holds_every_pair_once():
    sequence = [position_ for number in range(10) for position_ in order().micro_batch(number, 3)]
    for epoch in range(3):
        part = sequence[10 * epoch : 10 * epoch + 10]
        assert sorted(members(part)) == list(range(10))
        assert {position_.visit for position_ in part} == {epoch}


def test_epochs_and_seeds_differ():
    first, second = order().micro_batch(0, 10), order().micro_batch(1, 10)
    assert members(first) != members(second)
    assert members(first) != members(order(seed=1).micro_batch(0, 10))


def test_a_micro_batch_is_a_function_of_its_number():
    assert order().micro_batch(7, 4) == order().micro_batch(7, 4)


def test_micro_batches_of_any_size_walk_the_same_sequence():
    by_two = [position_ for number in range(6) for position_ in order().micro_batch(number, 2)]
    by_four = [position_ for number in range(3) for position_ in order().micro_batch(number, 4)]
    assert by_two == by_four


def test_a_data_set_smaller_than_the_micro_batch_wraps():
    positions = order(count=3).micro_batch(0, 8)
    assert Counter(members(positions)).most_common()[0][1] == 3
    assert [position_.visit for position_ in positions] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_replacement_depends_on_the_place_and_the_attempt_only():
    position_ = order().micro_batch(2, 4)[1]
    first = [order().replacement(position_, attempt).member for attempt in range(8)]
    assert first == [order().replacement(position_, attempt).member for attempt in range(8)]
    assert len(set(first)) > 1


def buckets():
    return Order(0, [np.arange(0, 6), np.arange(6, 10)])


def test_a_micro_batch_has_one_bucket():
    for number in range(20):
        assert len({position_.member < 6 for position_ in buckets().micro_batch(number, 4)}) == 1


def test_over_a_cycle_every_pair_of_every_bucket_comes_equally_often():
    plan, size = buckets(), 4
    for cycle in range(2):
        numbers = range(10 * cycle, 10 * cycle + 10)
        seen = Counter(m for n in numbers for m in members(plan.micro_batch(n, size)))
        assert seen == dict.fromkeys(range(10), size)


def test_the_schedule_is_sampled_once_a_cycle(monkeypatch):
    cycles = []
    visit = Order._sample_schedule
    monkeypatch.setattr(
        Order, "_sample_schedule", lambda self, cycle: cycles.append(cycle) or visit(self, cycle)
    )
    plan = buckets()
    for number in range(20):
        plan.micro_batch(number, 4)
    assert cycles == [0, 1]


def test_samples_within_a_bucket_count_its_own_epochs():
    plan = buckets()
    visits = Counter()
    for number in range(20):
        for position_ in plan.micro_batch(number, 4):
            assert position_.visit == visits[position_.member]
            visits[position_.member] += 1


def test_a_replacement_stays_in_the_bucket():
    plan = buckets()
    for number in range(10):
        position_ = plan.micro_batch(number, 1)[0]
        for attempt in range(5):
            assert (plan.replacement(position_, attempt).member < 6) == (position_.member < 6)


def banded(passes=2, buckets=None):
    """Ten pairs in two bands: the even ones, then the odd ones."""
    buckets = [np.arange(10)] if buckets is None else buckets
    return Order(0, buckets, bands=np.arange(10) % 2, passes=passes)


def test_a_band_is_seen_so_many_times_before_the_next_one_comes():
    positions = [position_ for n in range(8) for position_ in banded().micro_batch(n, 5)]
    by_five = [positions[start : start + 5] for start in range(0, 40, 5)]
    assert [sorted(members(part))[0] % 2 for part in by_five] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert all(len(set(members(part))) == 5 for part in by_five)
    assert [{p.visit for p in part} for part in by_five] == [{v} for v in (0, 1, 0, 1, 2, 3, 2, 3)]
    assert members(by_five[0]) != members(by_five[1])


def test_a_pair_of_a_band_is_replaced_by_one_of_the_same_band():
    position_ = banded().micro_batch(2, 5)[0]
    found = {banded().replacement(position_, attempt).member for attempt in range(40)}
    assert found == {1, 3, 5, 7, 9}


def test_visits_of_bands_are_counted_as_they_come():
    for passes in (1, 2, 3):
        seen = Counter()
        for number in range(9):
            seen.update(members(banded(passes).micro_batch(number, 4)))
            assert banded(passes).most_visits(number + 1, 4) == max(seen.values())


def test_one_band_is_no_band():
    plain = Order(3, [np.arange(10)])
    alone = Order(3, [np.arange(10)], bands=np.zeros(10, dtype=np.int64))
    assert [plain.micro_batch(n, 4) for n in range(9)] == [
        alone.micro_batch(n, 4) for n in range(9)
    ]


def test_each_bucket_goes_through_its_own_bands():
    order_ = banded(passes=1, buckets=[np.arange(0, 6), np.array([6, 8])])
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number in range(8):
        for position_ in order_.micro_batch(number, 1):
            seen[position_.bucket].append(position_.member)
    assert [member % 2 for member in seen[0]] == [0, 0, 0, 1, 1, 1]
    assert sorted(seen[1]) == [6, 8]
