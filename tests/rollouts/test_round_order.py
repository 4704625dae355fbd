from __future__ import annotations

from itertools import chain

from diffalign.rollouts.round_order import (
    in_batches,
    pack_pairs,
    pack_pool,
    shuffled,
    visits_of_round,
)

PAIRS = [[(pair, step) for step in range(5)] for pair in range(7)]


def test_shuffling_keeps_every_item_and_depends_on_the_seed_alone():
    items = list(range(50))
    assert sorted(shuffled(items, 1)) == items
    assert shuffled(items, 1) == shuffled(items, 1) != shuffled(items, 2)


def test_a_pool_is_cut_into_whole_optimiser_steps():
    packed = pack_pool(list(range(23)), rows=3, accumulation=2, seed=0)
    assert [len(batch) for batch in packed] == [3] * 6  # 7 batches of 3, cut to a multiple of 2
    assert len(set(chain(*packed))) == 18


def test_too_small_a_pool_gives_nothing():
    assert pack_pool(list(range(5)), rows=3, accumulation=2, seed=0) == []


def test_an_optimiser_step_over_a_trajectory_sees_every_step_of_its_pairs_once():
    packed = pack_pairs(PAIRS, rows=2, accumulation=5, seed=0)
    assert len(packed) == 15  # three groups of two pairs, five steps each
    for start in range(0, 15, 5):
        seen = list(chain(*packed[start : start + 5]))
        pairs = {pair for pair, _ in seen}
        assert len(pairs) == 2
        assert sorted(seen) == sorted((pair, step) for pair in pairs for step in range(5))
        assert all(len({pair for pair, _ in batch}) == 2 for batch in packed[start : start + 5])


def test_pairs_go_through_their_steps_in_orders_of_their_own():
    packed = pack_pairs(PAIRS, rows=7, accumulation=1, seed=0)
    orders = {
        pair: tuple(step for batch in packed for p, step in batch if p == pair) for pair in range(7)
    }
    assert len(set(orders.values())) > 4


PROMPTS = [f"prompt {i}" for i in range(10)]


def visits(number, count=4):
    return visits_of_round(PROMPTS, number, count=count, run_seed=0)


def test_rounds_walk_through_all_prompts_before_any_returns():
    first = [visit.prompt for number in range(5) for visit in visits(number)]
    assert sorted(first[:10]) == sorted(first[10:]) == PROMPTS
    assert first[:10] != first[10:]


def test_every_visit_has_noise_of_its_own():
    seeds = [visit.seed for number in range(5) for visit in visits(number)]
    assert len(set(seeds)) == 20


def test_a_round_may_be_larger_than_the_list():
    assert len(visits(0, count=25)) == 25


def test_batches_are_consecutive_and_the_last_may_be_small():
    batches = in_batches(visits(0), 3)
    assert [len(batch) for batch in batches] == [3, 1]
    assert [visit for batch in batches for visit in batch] == visits(0)
