from collections import Counter

import numpy as np

from diffalign.data.order import Order


def order(count=10, seed=0):
    return Order(seed, [np.arange(count)])


def members(turns):
    return [turn.member for turn in turns]


def test_every_epoch_holds_every_pair_once():
    sequence = [turn for number in range(10) for turn in order().micro_batch(number, 3)]
    for epoch in range(3):
        part = sequence[10 * epoch : 10 * epoch + 10]
        assert sorted(members(part)) == list(range(10))
        assert {turn.draw for turn in part} == {epoch}


def test_epochs_and_seeds_differ():
    first, second = order().micro_batch(0, 10), order().micro_batch(1, 10)
    assert members(first) != members(second)
    assert members(first) != members(order(seed=1).micro_batch(0, 10))


def test_a_micro_batch_is_a_function_of_its_number():
    assert order().micro_batch(7, 4) == order().micro_batch(7, 4)


def test_micro_batches_of_any_size_walk_the_same_sequence():
    by_two = [turn for number in range(6) for turn in order().micro_batch(number, 2)]
    by_four = [turn for number in range(3) for turn in order().micro_batch(number, 4)]
    assert by_two == by_four


def test_a_data_set_smaller_than_the_micro_batch_wraps():
    turns = order(count=3).micro_batch(0, 8)
    assert Counter(members(turns)).most_common()[0][1] == 3
    assert [turn.draw for turn in turns] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_replacement_depends_on_the_place_and_the_attempt_only():
    turn = order().micro_batch(2, 4)[1]
    first = [order().replacement(turn, attempt).member for attempt in range(8)]
    assert first == [order().replacement(turn, attempt).member for attempt in range(8)]
    assert len(set(first)) > 1


def buckets():
    return Order(0, [np.arange(0, 6), np.arange(6, 10)])


def test_a_micro_batch_has_one_bucket():
    for number in range(20):
        assert len({turn.member < 6 for turn in buckets().micro_batch(number, 4)}) == 1


def test_over_a_cycle_every_pair_of_every_bucket_comes_equally_often():
    plan, size = buckets(), 4
    for cycle in range(2):
        numbers = range(10 * cycle, 10 * cycle + 10)
        seen = Counter(m for n in numbers for m in members(plan.micro_batch(n, size)))
        assert seen == dict.fromkeys(range(10), size)


def test_the_schedule_is_drawn_once_a_cycle(monkeypatch):
    cycles = []
    draw = Order._draw_schedule
    monkeypatch.setattr(
        Order, "_draw_schedule", lambda self, cycle: cycles.append(cycle) or draw(self, cycle)
    )
    plan = buckets()
    for number in range(20):
        plan.micro_batch(number, 4)
    assert cycles == [0, 1]


def test_draws_within_a_bucket_count_its_own_epochs():
    plan = buckets()
    draws = Counter()
    for number in range(20):
        for turn in plan.micro_batch(number, 4):
            assert turn.draw == draws[turn.member]
            draws[turn.member] += 1


def test_a_replacement_stays_in_the_bucket():
    plan = buckets()
    for number in range(10):
        turn = plan.micro_batch(number, 1)[0]
        for attempt in range(5):
            assert (plan.replacement(turn, attempt).member < 6) == (turn.member < 6)
