from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from diffalign.training.hooks.base import AbstractHook, inspecting
from tests.training.toys import toy_trainer, weights


class Disturbing(AbstractHook):
    """Uses up the generators of the process at every moment it is given."""

    group = "disturbing"

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.sum = torch.zeros(())

    def _disturb(self, moment: str) -> dict[str, float]:
        self.moments.append(moment)
        self.sum += torch.rand(())
        random.random()
        np.random.rand()  # noqa: NPY002  # on purpose
        return {}

    def start(self, run):
        return self._disturb("start")

    def after_step(self, run, outcome):
        return {**self._disturb(f"step {run.step}{' complete' * outcome.complete}"), "mine": 1.0}

    def after_log(self, run, row):
        assert row["step"] == run.step
        self._disturb(f"log {row['step']}")

    def end(self, run):
        self.moments.append("end")

    def state_dict(self):
        return {"sum": self.sum}

    def load_state_dict(self, state):
        self.sum = state["sum"].clone()


def test_hooks_are_called_at_their_moments(tmp_path):
    hook = Disturbing()
    toy_trainer(tmp_path, hooks=[hook], optimizer_steps=2).fit()
    assert hook.moments == ["start", "step 1", "log 1", "step 2 complete", "log 2", "end"]


def test_a_hook_that_uses_up_random_numbers_leaves_the_weights_as_they_would_be(tmp_path):
    settings = {"dropout": 0.4, "optimizer_steps": 4}
    plain = toy_trainer(tmp_path / "plain", **settings)
    plain.fit()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = (random.random(), np.random.rand())  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    hooked = toy_trainer(tmp_path / "hooked", hooks=[Disturbing()], **settings)
    hooked.fit()
    assert torch.equal(weights(plain), weights(hooked))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_the_state_of_a_hook_is_that_of_the_checkpoint(tmp_path):
    first = Disturbing()
    toy_trainer(tmp_path, hooks=[first], optimizer_steps=4, checkpoint_every=2).fit()
    second = Disturbing()
    trainer = toy_trainer(tmp_path, hooks=[second], optimizer_steps=4)
    trainer.resume(tmp_path / "checkpoint-4")
    assert second.sum == first.sum != 0
    assert (tmp_path / "checkpoint-4/disturbing.safetensors").is_file()


def test_hooks_end_with_a_run_that_breaks(tmp_path):
    class Broken(Disturbing):
        group = ""

        def after_step(self, run, outcome):
            raise OSError("broken")

    hook = Broken()
    with pytest.raises(OSError, match="broken"):
        toy_trainer(tmp_path, hooks=[hook]).fit()
    assert hook.moments == ["start", "end"]


def test_two_hooks_cannot_save_into_one_file(tmp_path):
    with pytest.raises(AssertionError, match="save into one file"):
        toy_trainer(tmp_path, hooks=[Disturbing(), Disturbing()])


def test_a_policy_that_is_inspected_has_no_dropout_and_no_gradient_and_gets_its_modes_back(
    tmp_path,
):
    trainer = toy_trainer(tmp_path, dropout=0.5)
    model = trainer.model
    model.network[1].eval()
    modes = [module.training for module in model.network.modules()]
    rows = torch.randn(4, 6)
    with inspecting(trainer):
        first, second = model.network(rows), model.network(rows)
    assert torch.equal(first, second) and not first.requires_grad
    assert [module.training for module in model.network.modules()] == modes
