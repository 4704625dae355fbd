from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from diffalign.errors import ConfigError
from diffalign.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    check_optimizer,
    parameter_groups,
)


def learning_rates(steps: int, **fields) -> list[float]:
    config = OptimizerConfig(lr=1.0, **fields)
    optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(config, optimizer, optimizer_steps=steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_learning_rate_is_applied_as_written():
    assert learning_rates(3) == [1.0, 1.0, 1.0]


def test_warm_up_is_linear_in_optimiser_steps():
    assert learning_rates(5, warmup_steps=4) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_linear_and_cosine_fall_from_the_peak():
    assert learning_rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert learning_rates(4, schedule="cosine")[2] == pytest.approx(0.5)


def test_parts_may_have_a_rate_of_their_own_under_the_same_schedule():
    named = [(name, nn.Parameter(torch.zeros(1))) for name in ("projector", "adapter", "bias")]
    groups = parameter_groups(named, {"projector": 0.5})
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert groups[1]["params"][0] is named[0][1]
    config = OptimizerConfig(lr=2.0, schedule="linear")
    optimizer = build_optimizer(config, groups)
    schedule = build_schedule(config, optimizer, optimizer_steps=2)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 0.25])


def test_without_rates_of_their_own_all_parameters_are_one_group_in_order():
    named = [(name, nn.Parameter(torch.zeros(1))) for name in "ba"]
    (group,) = parameter_groups(named, {})
    assert [id(parameter) for parameter in group["params"]] == [id(named[0][1]), id(named[1][1])]


def test_adamw_takes_the_published_decay_and_is_fused():
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3), [nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.999), 1e-8)
    assert group["fused"]


def test_eight_bit_without_its_package_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # peft may have loaded it
    with pytest.raises(ConfigError, match=r"pip install 'diffalign\[bitsandbytes\]'"):
        check_optimizer(OptimizerConfig(kind="adamw_8bit", lr=1e-4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"lr": 1.0, "betas": (0.9,)}, "betas must be two numbers"),
        ({"lr": 1.0, "warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"lr": 1.0, "max_grad_norm": 0.0}, "null turns clipping off"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
