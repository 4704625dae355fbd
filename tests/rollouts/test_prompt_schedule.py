from __future__ import annotations

from diffalign.rollouts.prompt_schedule import in_batches, visits_of_round

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
