"""Which policy is a round's reference, and that it is the one that was kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffalign.errors import DataError
from diffalign.rollouts.policy_snapshots import PolicySnapshots, reference_round


class Policy:
    """One number in training, and the number that it is compared with."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.reference: float | None = None

    def snapshot(self):
        return {"value": torch.tensor([self.value])}

    def refer_to(self, values):
        self.reference = values["value"].item()


def snapshots(folder, rule="uniform"):
    return PolicySnapshots(folder, rule=rule, run_seed=0)


def keep(folder, *values, rule="uniform"):
    """Rounds that began with these values."""
    for number, value in enumerate(values):
        snapshots(folder, rule).keep(Policy(value), number)


def test_uniform_picks_every_policy_so_far_equally_often():
    picked = Counter(reference_round("uniform", seed, 3) for seed in range(4000))
    assert sorted(picked) == [0, 1, 2, 3]
    assert all(900 < count < 1100 for count in picked.values())


def test_the_first_round_has_its_own_first_policy_as_reference():
    for rule in ("initial", "latest", "uniform"):
        assert reference_round(rule, 5, 0) == 0


def test_initial_and_latest_stand_where_their_names_say():
    assert [reference_round("initial", 0, number) for number in range(4)] == [0, 0, 0, 0]
    assert [reference_round("latest", 0, number) for number in range(4)] == [0, 1, 2, 3]


def test_a_round_keeps_its_reference_however_often_it_is_asked_for(tmp_path):
    keep(tmp_path, *range(8))
    for number in range(8):
        seen = set()
        for _ in range(3):  # each time as a run that was started again
            model = Policy(100.0)
            snapshots(tmp_path).refer(model, number)
            seen.add(model.reference)
        assert seen == {float(reference_round("uniform", 0, number))}


def test_a_policy_that_is_kept_is_not_overwritten(tmp_path):
    keep(tmp_path, 1.0)
    keep(tmp_path, 2.0)
    model = Policy(3.0)
    snapshots(tmp_path).refer(model, 0)
    assert model.reference == 1.0


def test_all_policies_of_a_uniform_reference_stay(tmp_path):
    keep(tmp_path, *range(5))
    snapshots(tmp_path).release(before=5)
    assert len(list(tmp_path.rglob("policy.safetensors"))) == 5


@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_a_policy_that_cannot_be_read_is_named(tmp_path, content):
    keep(tmp_path, 1.0)
    path = tmp_path / "round-0000/policy.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"round-0000/policy\.safetensors: round 0 is compared with"
    ):
        snapshots(tmp_path).refer(Policy(1.0), 0)
