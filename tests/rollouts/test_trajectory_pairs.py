from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from diffalign import world
from diffalign.errors import ConfigError
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.rollouts.store import LATENTS, write_tensors
from diffalign.rollouts.trajectory_pairs import PairedSteps, TrajectoryPair
from tests.rollouts.runs import row_metadata

STEPS = 4
TIMES = [(751, 501), (501, 251), (251, 1), (1, 0)]


def paired_steps(model_path, tmp_path, *, samples_per_device=2, trained_steps=None):
    run = row_metadata(
        tmp_path,
        run_seed=5,
        model=SD15(path=str(model_path)),
        samples_per_device=samples_per_device,
        accumulation=STEPS,
        process=ReverseProcess(steps=STEPS),
    )
    return PairedSteps(run, trained_steps)


@pytest.fixture
def pairs(tmp_path):
    """Five pairs among four trajectories, whose latents say trajectory and step."""
    rows = torch.tensor([10.0 * i + j for j in range(STEPS + 1) for i in range(4)])
    write_tensors(
        tmp_path / "x.safetensors", {LATENTS: rows.reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)}
    )
    return [
        TrajectoryPair(
            pair_id=f"{chosen}-over-{rejected}",
            prompt=f"a {chosen}",
            file="x.safetensors",
            trajectories=4,
            chosen=chosen,
            rejected=rejected,
        )
        for chosen, rejected in ((0, 1), (1, 2), (2, 3), (3, 0), (2, 0))
    ]


def read(batch):
    """(sample id, t, t_next, state and outcome of either side) of every row of a batch."""
    rows = []
    for row, name in enumerate(batch.sample_ids):
        states = {view: int(batch.state_rows[view][row]) for view in ("chosen", "rejected")}
        times = {(int(batch.t[state]), int(batch.t_next[state])) for state in states.values()}
        (time,) = times  # both sides are at the same one
        ways = [
            (batch.states[states[view]].mean().item(), batch.outcomes[view][row].mean().item())
            for view in ("chosen", "rejected")
        ]
        rows.append((name, time, *ways))
    return rows


def test_a_step_leads_from_a_latent_of_its_trajectory_to_the_next(tiny_sd15, tmp_path, pairs):
    steps = paired_steps(tiny_sd15, tmp_path)
    seen = [row for batch in steps.batches(0, pairs, tmp_path, 0) for row in read(batch)]
    for name, time, chosen, rejected in seen:
        sides, _, step = name.partition("/step-")
        winner, loser = map(int, sides.split("-over-"))
        j = int(step)
        assert time == TIMES[j]
        assert chosen == (10 * winner + j, 10 * winner + j + 1)
        assert rejected == (10 * loser + j, 10 * loser + j + 1)


def test_an_optimiser_step_takes_every_step_of_its_pairs_once(tiny_sd15, tmp_path, pairs):
    steps = paired_steps(tiny_sd15, tmp_path)
    batches = [read(batch) for batch in steps.batches(0, pairs, tmp_path, 0)]
    assert len(batches) == steps.micro_batches(0, len(pairs)) == 2 * STEPS  # the fifth pair waits
    for start in (0, STEPS):
        rows = [row for batch in batches[start : start + STEPS] for row in batch]
        assert Counter(name.partition("/")[0] for name, *_ in rows).most_common() == [
            (name, STEPS) for name in dict.fromkeys(row[0].partition("/")[0] for row in rows)
        ]
        assert len({row[0] for row in rows}) == 2 * STEPS


def test_rounds_differ_in_order_and_a_round_does_not(tiny_sd15, tmp_path, pairs):
    steps = paired_steps(tiny_sd15, tmp_path)

    def names(number, start=0):
        return [batch.sample_ids for batch in steps.batches(number, pairs, tmp_path, start)]

    assert names(0) == names(0) != names(1)
    assert names(0, start=3 * 2) == names(0)[3:]


def test_two_ranks_share_what_one_of_twice_the_size_sees(tiny_sd15, tmp_path, pairs, monkeypatch):
    whole = paired_steps(tiny_sd15, tmp_path).batches(0, pairs, tmp_path, 0)
    expected = [batch.sample_ids for batch in whole]
    monkeypatch.setattr(world, "size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        steps = paired_steps(tiny_sd15, tmp_path, samples_per_device=1)
        shares.append(list(islice(steps.batches(0, pairs, tmp_path, 0), 8)))
    assert [a.sample_ids + b.sample_ids for a, b in zip(*shares, strict=True)] == expected


def test_the_start_of_a_run_says_how_many_steps_a_pair_gives(tiny_sd15, tmp_path):
    steps = paired_steps(tiny_sd15, tmp_path)
    assert "gives 4 pairs of steps, and an optimiser step takes 8" in steps.describe()
    assert (steps.steps(5), steps.trained(8)) == (20, 16)


def test_the_first_steps_alone_are_trained_on_if_so_wished(tiny_sd15, tmp_path, pairs):
    steps = paired_steps(tiny_sd15, tmp_path, trained_steps=2)
    seen = [row for batch in steps.batches(0, pairs, tmp_path, 0) for row in read(batch)]
    assert Counter(time for _, time, *_ in seen) == {TIMES[0]: 4, TIMES[1]: 4}  # of four pairs
    assert (steps.steps(5), steps.trained(steps.micro_batches(0, 5))) == (10, 8)
    assert "gives 2 pairs of steps" in steps.describe()
    assert "the first 2 of 4 steps" in steps.describe()


def test_as_many_steps_as_there_are_is_all_of_them(tiny_sd15, tmp_path, pairs):
    def names(trained_steps):
        steps = paired_steps(tiny_sd15, tmp_path, trained_steps=trained_steps)
        return [batch.sample_ids for batch in steps.batches(0, pairs, tmp_path, 0)]

    assert names(STEPS) == names(None)


def test_more_steps_than_there_are_is_refused(tiny_sd15, tmp_path):
    with pytest.raises(
        ConfigError, match=r"trained_steps is 5, and likelihood\.process\.steps is 4: train on at"
    ):
        paired_steps(tiny_sd15, tmp_path, trained_steps=STEPS + 1)
