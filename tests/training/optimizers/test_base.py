from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.training.optimizers.adamw import AdamW
from diffalign.training.optimizers.base import build_schedule, parameter_groups


def learning_rates(steps: int, **fields) -> list[float]:
    config = AdamW(lr=1.0, **fields)
    optimizer = config.build([nn.Parameter(torch.zeros(1))])
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
    config = AdamW(lr=2.0, schedule="linear")
    optimizer = config.build(groups)
    schedule = build_schedule(config, optimizer, optimizer_steps=2)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 0.25])


def test_without_rates_of_their_own_all_parameters_are_one_group_in_order():
    named = [(name, nn.Parameter(torch.zeros(1))) for name in "ba"]
    (group,) = parameter_groups(named, {})
    assert [id(parameter) for parameter in group["params"]] == [id(named[0][1]), id(named[1][1])]


def test_adamw_takes_the_published_decay_and_is_fused():
    optimizer = AdamW(lr=1e-3).build([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.999), 1e-8)
    assert group["fused"]


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
        AdamW(**fields)
