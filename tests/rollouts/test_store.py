from __future__ import annotations

import pytest
import torch

from diffalign.errors import DataError
from diffalign.rollouts.store import (
    LATENTS,
    StepPair,
    read_steps,
    step_batch,
    write_steps,
    write_tensors,
)


def pair(sample_id, file, chosen, rejected, t=51):
    return StepPair(
        sample_id=sample_id,
        prompt=f"a {sample_id}",
        file=file,
        t=t,
        t_next=t - 50,
        states={"chosen": chosen[0], "rejected": rejected[0]},
        outcomes={"chosen": chosen[1], "rejected": rejected[1]},
    )


@pytest.fixture
def folder(tmp_path):
    for name, offset in (("a.safetensors", 0), ("b.safetensors", 100)):
        rows = torch.arange(6.0).reshape(6, 1, 1, 1) + offset
        write_tensors(tmp_path / name, {LATENTS: rows.expand(6, 4, 2, 2)})
    return tmp_path


def first_numbers(latents):
    return latents[:, 0, 0, 0].tolist()


def test_a_batch_holds_the_rows_that_its_steps_name(folder):
    steps = [
        pair("x", "a.safetensors", chosen=(0, 1), rejected=(2, 3)),
        pair("y", "b.safetensors", chosen=(4, 5), rejected=(0, 1), t=101),
    ]
    batch = step_batch(folder, steps)
    assert first_numbers(batch.states[batch.state_rows["chosen"]]) == [0, 104]
    assert first_numbers(batch.states[batch.state_rows["rejected"]]) == [2, 100]
    assert first_numbers(batch.outcomes["chosen"]) == [1, 105]
    assert first_numbers(batch.outcomes["rejected"]) == [3, 101]
    assert batch.prompts == ("a x", "a x", "a y", "a y")
    assert batch.t.tolist() == [51, 51, 101, 101]
    assert batch.t_next.tolist() == [1, 1, 51, 51]
    assert batch.states.dtype == torch.float32


def test_sides_that_leave_from_the_same_row_share_a_state(folder):
    steps = [
        pair("x", "a.safetensors", chosen=(0, 1), rejected=(0, 2)),
        pair("y", "b.safetensors", chosen=(0, 1), rejected=(0, 2)),
    ]
    batch = step_batch(folder, steps)
    assert first_numbers(batch.states) == [0, 100]
    assert batch.state_rows["chosen"].tolist() == batch.state_rows["rejected"].tolist() == [0, 1]


def test_steps_survive_their_file(tmp_path):
    steps = [pair("x", "a.safetensors", chosen=(0, 1), rejected=(2, 3))]
    write_steps(tmp_path, steps)
    assert read_steps(tmp_path) == steps


def test_a_disk_that_refuses_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written .*--resume"):
        write_tensors(tmp_path / "file" / "x.safetensors", {LATENTS: torch.zeros(1)})
