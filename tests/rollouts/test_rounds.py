"""Rounds with the smallest collector there is: files that say which policy made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

from diffalign.errors import DataError
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.rollouts.base import (
    AbstractImageRollouts,
    Phase,
    RoundSummary,
    Work,
)
from diffalign.rollouts.preview_strip import AbstractImageCollector
from diffalign.rollouts.round_order import own_parts, pack_pool
from diffalign.rollouts.rounds import Rounds
from tests.rollouts.runs import row_metadata
from tests.runs import Killed
from tests.worlds import MOVED, ON_TWO, samples_of_steps


class Policy:
    """One number in training; what `Rounds` asks of a model."""

    def __init__(self) -> None:
        self.value = torch.nn.Parameter(torch.zeros(1))
        self.referred: list[float] = []

    def fingerprint(self):
        return "policy"

    def trained_parameters(self):
        return iter([("value", self.value)])

    def snapshot(self):
        return {"value": self.value.detach().clone()}

    def refer_to(self, values):
        self.referred.append(values["value"].item())

    def train(self):
        """What an optimiser does between two batches."""
        self.value.data += 1


class Numbers(AbstractImageCollector):
    """Two phases of three works; a round has so many batches of (policy, round, batch)."""

    def __init__(self, batches_of_round=lambda number: 2) -> None:
        self.batches_of_round = batches_of_round
        self.done: list[str] = []
        self.killed_at: str | None = None

    def phases(self, number):
        for title in ("sample", "score"):
            files = [f"{title}-{i}.json" for i in range(3)]
            yield Phase(title, [Work(file, 5, partial(self._do, file)) for file in files])

    def _do(self, file, model, folder):
        if file == self.killed_at:
            self.killed_at = None
            raise Killed
        self.done.append(f"{folder.name}/{file}")
        (folder / file).write_text(json.dumps(model.value.item()))

    def summarise_round(self, number, folder):
        if self.killed_at == "harvest":
            self.killed_at = None
            raise Killed
        made_by = {json.loads(path.read_text()) for path in folder.glob("s*-*.json")}
        assert len(made_by) == 1, "files of two policies in one round"
        return RoundSummary(
            micro_batches=self.batches_of_round(number),
            summary={"policy": float(made_by.pop())},
            skipped={"tied": 1},
            sentence="nothing to see",
        )

    def batches(self, number, folder, start):
        policy = json.loads((folder / "sample-0.json").read_text())
        for batch in range(start, self.batches_of_round(number)):
            yield policy, number, batch

    def release(self, folder):
        (folder / "sample-0.json").unlink(missing_ok=True)

    def preview_prompts(self):
        return []

    def preview_process(self):
        return ReverseProcess()

    def describe(self):
        return ["numbers"]

    def fingerprint(self):
        return "numbers"


@dataclass(frozen=True, kw_only=True)
class NumberRollouts(AbstractImageRollouts):
    batch_type: ClassVar[type] = tuple
    views: ClassVar[frozenset[str]] = frozenset({"chosen"})

    def open(self, run):
        raise NotImplementedError

    def describe(self):
        return "numbers"


def rounds(folder, collector=None, model=None, reference="initial", **changes):
    source = Rounds(
        NumberRollouts(reference=reference), collector or Numbers(), row_metadata(folder, **changes)
    )
    source.bind(model or Policy())
    return source


def train(source, steps):
    """The batches of some steps, each followed by an update."""
    seen = []
    batches = iter(source)
    for _ in range(steps):
        seen.append(next(batches))
        source.model.train()
    return seen


def test_a_round_is_sampled_by_the_policy_that_it_begins_with(tmp_path):
    assert train(rounds(tmp_path), 5) == [(0, 0, 0), (0, 0, 1), (2, 1, 0), (2, 1, 1), (4, 2, 0)]


@pytest.mark.parametrize("file", ["sample-1.json", "score-2.json", "harvest"])
def test_a_killed_round_makes_only_what_is_missing(tmp_path, file):
    killed = Numbers()
    killed.killed_at = file
    with pytest.raises(Killed):
        train(rounds(tmp_path, killed), 1)
    resumed = Numbers()
    assert train(rounds(tmp_path, resumed), 3) == train(rounds(tmp_path / "whole"), 3)
    first_round = [name for name in killed.done + resumed.done if name.startswith("round-0000")]
    assert sorted(first_round) == sorted(set(first_round))
    assert len(first_round) == 6


def test_a_run_goes_on_in_the_middle_of_a_round_and_takes_up_later_rounds(tmp_path):
    model = Policy()
    source = rounds(tmp_path, model=model)
    train(source, 1)
    state, weights = source.state_dict(), model.value.item()
    whole = train(rounds(tmp_path / "whole"), 5)

    train(source, 3)  # on to round 1, then killed and back to the checkpoint
    again = Numbers()
    model = Policy()
    model.value.data += weights
    resumed = rounds(tmp_path, again, model)
    resumed.load_state_dict(state)
    assert train(resumed, 4) == whole[1:]
    assert {name.split("/")[0] for name in again.done} == {"round-0002"}


def test_files_of_another_policy_are_not_taken_up(tmp_path):
    train(rounds(tmp_path), 1)
    other = Policy()
    other.train()
    assert train(rounds(tmp_path, model=other), 1) == [(1, 0, 0)]


def test_files_of_other_settings_are_not_taken_up(tmp_path):
    train(rounds(tmp_path), 1)
    again = Numbers()
    train(rounds(tmp_path, again, settings="guidance 9"), 1)
    assert len(again.done) == 6


def test_a_damaged_record_is_made_again_of_what_was_collected(tmp_path):
    before = train(rounds(tmp_path), 2)
    record = tmp_path / "round-0000/round.json"
    whole = record.read_bytes()
    for content in (b"", b"{", b"[]", b'{"policy": 3}', whole[:-9]):
        record.write_bytes(content)
        again = Numbers()
        assert train(rounds(tmp_path, again), 2) == before
        assert not again.done and record.read_bytes() == whole


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"policy": "0"}'])
def test_a_round_whose_record_is_gone_or_damaged_cannot_be_resumed(tmp_path, content):
    source = rounds(tmp_path)
    train(source, 1)
    (tmp_path / "round-0000/round.json").unlink()
    if content is not None:
        (tmp_path / "round-0000/round.json").write_bytes(content)
    resumed = rounds(tmp_path)
    resumed.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match=r"round-0000: .*round\.json is gone.*another checkpoint"):
        train(resumed, 1)


def test_a_round_that_was_sampled_anew_is_not_that_of_an_older_checkpoint(tmp_path):
    source = rounds(tmp_path)
    train(source, 1)
    record = tmp_path / "round-0000/round.json"
    record.write_text(record.read_text().replace('"policy": "', '"policy": "other'))
    resumed = rounds(tmp_path)
    resumed.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match="sampled anew since, by another policy"):
        train(resumed, 1)


def test_what_cannot_work_is_found_out_before_anything_is_sampled_or_removed(tmp_path):
    class Mute(Numbers):
        def warm_up(self, model):
            raise DataError("the scorer has no words")

    train(rounds(tmp_path), 1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(DataError, match="no words"):
        train(rounds(tmp_path, Mute(), settings="others"), 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_log_is_told_the_figures_of_the_round_that_is_trained_on(tmp_path):
    source = rounds(tmp_path)
    assert source.figures() == {}
    train(source, 1)
    first = source.figures()
    train(source, 2)
    assert first.keys() == source.figures().keys() == {"round/policy"}
    assert first != source.figures()


def test_another_run_in_the_same_folder_begins_another_preview_strip(tmp_path):
    (tmp_path / "preview_strip").mkdir()
    (tmp_path / "preview_strip/prompts.json").write_text('["of an earlier run"]')
    train(rounds(tmp_path), 1)
    assert "of an earlier run" not in (tmp_path / "preview_strip/prompts.json").read_text()


def test_another_global_micro_batch_is_refused(tmp_path):
    source = rounds(tmp_path, samples_per_device=2)
    train(source, 1)
    with pytest.raises(DataError, match="micro-batches of 2 samples, and those of this run have 1"):
        rounds(tmp_path).load_state_dict(source.state_dict())


class Shared(Numbers):
    """Rounds of three optimiser steps of numbers, from a pool that does not quite fill a fourth."""

    def __init__(self, layout):
        self.layout = layout
        super().__init__(lambda number: 3 * layout.micro_batches)

    def batches(self, number, folder, samples):
        pool = [(number, item) for item in range(4 * self.layout.samples_per_step - 1)]
        rows, accumulation = self.layout.micro_batch, self.layout.micro_batches
        packed = pack_pool(pool, rows=rows, accumulation=accumulation, seed=number)
        return own_parts(packed, self.layout, samples)


@pytest.mark.parametrize("moved", MOVED)
def test_a_step_sees_the_same_samples_of_a_round_on_any_number_of_processes(
    moved, tmp_path, monkeypatch
):
    def see(folder, stages):
        return samples_of_steps(
            monkeypatch,
            lambda layout: rounds(folder, Shared(layout), layout=layout),
            stages,
            accumulation=2,
            names=list,
        )

    expected = see(tmp_path / "alone", ON_TWO)
    assert see(tmp_path / "moved", MOVED[moved]) == expected
    assert [{number for number, _ in step} for step in expected] == [
        *[{0}] * 3,
        *[{1}] * 3,
        {2},
    ]
    assert all(len(set(step)) == 8 for step in expected)


def test_a_position_of_an_older_checkpoint_is_read(tmp_path):
    source = rounds(tmp_path)
    seen = train(source, 4)
    state = source.state_dict()
    old = {key: state[key] for key in ("round", "policy", "skipped")}
    resumed = rounds(tmp_path, model=source.model)
    resumed.load_state_dict({**old, "batch": 1, "rows_per_micro_batch": 1})
    assert train(resumed, 1) == seen[3:]
    assert state["samples"] == 2
    with pytest.raises(DataError, match="micro-batches of 4 samples, and those of this run have 1"):
        rounds(tmp_path).load_state_dict({**old, "batch": 1, "rows_per_micro_batch": 4})


def test_rounds_without_a_batch_are_passed_over_and_then_refused(tmp_path):
    source = rounds(tmp_path / "some", Numbers(lambda number: int(number == 2)))
    assert train(source, 1) == [(0, 2, 0)]
    with pytest.raises(DataError, match=r"10 rounds in a row .*nothing to see"):
        train(rounds(tmp_path / "none", Numbers(lambda number: 0)), 1)


def test_what_was_left_out_is_counted_once_though_a_run_is_resumed(tmp_path):
    source = rounds(tmp_path)
    train(source, 3)
    state = source.state_dict()
    assert source.skipped_counts == {"tied": 2}
    resumed = rounds(tmp_path, model=source.model)
    resumed.load_state_dict(state)
    train(resumed, 1)
    assert resumed.skipped_counts == {"tied": 2}


def test_files_that_no_checkpoint_asks_for_are_released(tmp_path):
    source = rounds(tmp_path)
    train(source, 5)
    source.release({"round": 1})
    kept = {path.parent.name for path in tmp_path.glob("*/sample-0.json")}
    assert kept == {"round-0001", "round-0002"}


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        ("latest", [{0.0}, {2.0}, {4.0}]),
        ("uniform", [{0.0}, {0.0, 2.0}, {0.0, 2.0, 4.0}]),
    ],
)
def test_the_reference_of_a_round_is_an_earlier_policy(tmp_path, rule, allowed):
    model = Policy()
    train(rounds(tmp_path, model=model, reference=rule), 6)
    for number, policies in enumerate(allowed):
        during = model.referred[2 * number : 2 * number + 2]  # to collect, then to train
        assert during[0] == during[1] and during[0] in policies


def test_an_initial_reference_keeps_no_policies(tmp_path):
    model = Policy()
    train(rounds(tmp_path, model=model), 3)
    assert model.referred == []
    assert not list(tmp_path.rglob("policy.safetensors"))


def test_a_uniform_reference_visits_old_and_new_policies(tmp_path):
    model = Policy()
    train(rounds(tmp_path, Numbers(lambda number: 1), model, reference="uniform"), 30)
    ages = [number - value for number, value in enumerate(model.referred[::2])]
    assert 0.0 in ages and max(ages) > 10
    assert len(set(model.referred)) > 8


def test_only_a_latest_reference_releases_policies(tmp_path):
    for rule, kept in (("latest", 2), ("uniform", 3)):
        source = rounds(tmp_path / rule, reference=rule)
        train(source, 6)
        source.release({"round": 1})
        assert len(list((tmp_path / rule).rglob("policy.safetensors"))) == kept
