"""What every optimiser has to do, and what each of them does by its paper."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffalign import components, config
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.vlm.config import VLM
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.hooks.base import AbstractHook, inspecting
from diffalign.training.optimizers.adafactor import Adafactor
from diffalign.training.optimizers.adamw import AdamW
from diffalign.training.optimizers.adamw_8bit import AdamW8bit
from diffalign.training.optimizers.base import AbstractOptimizer
from diffalign.training.optimizers.prodigy import Prodigy
from diffalign.training.optimizers.schedule_free import ScheduleFree
from diffalign.training.run_state import pack_optimizer, refuse_other_run, unpack_optimizer
from tests.training.toys import toy_trainer, weights

ROOT = Path(__file__).parents[3]
KINDS = components.kinds(AbstractOptimizer)
RATE = {"prodigy": 1.0}
"""Learning rates of those that do not take just any."""


def found(kind: str) -> type[AbstractOptimizer]:
    """The class of a kind; skips where its package is not installed."""
    cls = components.find(AbstractOptimizer, kind)
    if cls.package and importlib.util.find_spec(cls.package) is None:
        pytest.skip(f"{cls.package} is not installed")
    return cls


def made(kind: str, **fields) -> AbstractOptimizer:
    return found(kind)(lr=RATE.get(kind, 1e-2), **fields)


def layer(rows: int = 3, columns: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows)


def take_step(module: nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(seed))
    module(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_kinds_are_those_of_the_documentation():
    assert [
        *("adafactor", "adamw", "adamw_8bit", "paged_adamw_8bit", "prodigy", "schedule_free")
    ] == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_every_kind_ends_bit_for_bit_where_the_whole_one_does(tmp_path, kind):
    settings = {"optimizer": made(kind, warmup_steps=1), "optimizer_steps": 4, "dropout": 0.3}
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.fit()
    toy_trainer(tmp_path / "cut", checkpoint_every=2, keep_checkpoints=9, **settings).fit()
    second = toy_trainer(tmp_path / "cut", **settings)
    second.resume(tmp_path / "cut/checkpoint-2")
    second.fit()
    assert torch.equal(weights(whole), weights(second))
    ours, theirs = (load_file(tmp_path / n / "checkpoint-4/optimizer.safetensors")
                    for n in ("whole", "cut"))  # fmt: skip
    assert ours and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_over_groups_continues_exactly_from_its_packed_state(kind):
    settings = made(kind)

    def make():
        module = layer(128, 64)  # large enough to be kept in 8 bits
        parts = [{"params": [module.weight]}, {"params": [module.bias], "lr": 0.05}]
        if not settings.takes_own_rates:
            del parts[1]["lr"]
        return module, settings.build(parts)

    whole, optimizer = make()
    for seed in range(2):
        take_step(whole, optimizer, seed)
    tensors, values = pack_optimizer(optimizer)
    resumed, restored = make()
    with torch.no_grad():
        resumed.load_state_dict(whole.state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    unpack_optimizer(restored, copies, values)
    for seed in range(2, 4):
        take_step(whole, optimizer, seed)
        take_step(resumed, restored, seed)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert not torch.equal(whole.weight, layer(128, 64).weight)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prodigy"])
def test_a_part_with_a_rate_of_its_own_moves_by_it(kind):
    settings = made(kind, weight_decay=0.0)
    moved = {}
    for rate in (1e-3, 1e-2):
        module = layer()
        before = module.bias.detach().clone()
        parts = [{"params": [module.weight]}, {"params": [module.bias], "lr": rate}]
        take_step(module, settings.build(parts), 0)
        moved[rate] = module.bias.detach() - before
    assert torch.allclose(10 * moved[1e-3], moved[1e-2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "schedule_free"])
def test_a_moving_average_is_kept_over_every_kind(tmp_path, kind):
    trainer = toy_trainer(tmp_path, optimizer=made(kind), ema_decay=0.9, optimizer_steps=3)
    trainer.fit()
    average = torch.cat([v.flatten() for v in trainer.average.state_dict().values()])
    assert not torch.equal(average, weights(trainer))


def test_eight_bits_come_near_to_adamw():
    moved = []
    for settings in (AdamW(lr=1e-2), made("adamw_8bit")):
        module = layer(128, 64)
        optimizer = settings.build(list(module.parameters()))
        for seed in range(4):
            take_step(module, optimizer, seed)
        moved.append(module.weight.detach() - layer(128, 64).weight.detach())
    assert 0 < float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.05


def test_adafactor_takes_its_first_step_by_its_paper():
    module = layer()
    before = module.weight.detach().numpy().astype(np.float64)
    module(torch.ones(1, 2)).square().sum().backward()
    squared = module.weight.grad.numpy().astype(np.float64) ** 2 + 1e-30
    rows, columns = squared.mean(1), squared.mean(0)  # at the first step beta2 is 0
    update = module.weight.grad.numpy() / np.sqrt(np.outer(rows, columns) / rows.mean())
    update /= max(1.0, np.sqrt((update**2).mean()))
    optimizer = Adafactor(lr=0.1, weight_decay=0.5).build(list(module.parameters()))
    optimizer.step()
    expected = before - 0.1 * update - 0.1 * 0.5 * before
    assert module.weight.detach().numpy() == pytest.approx(expected, abs=1e-6)


def test_prodigy_finds_a_larger_step_and_says_it():
    settings = made("prodigy", d_coef=2.0)
    module = layer()
    optimizer = settings.build(list(module.parameters()))
    first = settings.figures(optimizer)["optimizer/step_size"]
    for seed in range(8):
        take_step(module, optimizer, seed)
    assert first == 1e-6 < settings.figures(optimizer)["optimizer/step_size"]
    assert optimizer.param_groups[0]["d_coef"] == 2.0
    assert not optimizer.param_groups[0]["safeguard_warmup"]
    warmed = made("prodigy", warmup_steps=2).build([nn.Parameter(torch.ones(1))])
    assert warmed.param_groups[0]["safeguard_warmup"]


def by_the_paper(start: float, gradient: float, rates: list[float], beta: float) -> list[float]:
    """y and x of one weight under a constant gradient, by equations 5 to 7 with Adam's
    normalisation: under a constant gradient it is a step of `rate` to the negative side. x counts
    each z by the square of the greatest rate so far."""
    z, x, summed, largest = start, start, 0.0, 0.0
    for rate in rates:
        z -= rate * float(np.sign(gradient))
        largest = max(largest, rate)
        summed += largest**2
        share = largest**2 / summed if summed else 0.0
        x = (1 - share) * x + share * z
    return [(1 - beta) * z + beta * x, x]


def test_schedule_free_trains_at_y_and_gives_away_x():
    settings = made("schedule_free", weight_decay=0.0, eps=0.0, betas=(0.9, 0.99))
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = settings.build([weight])
    assert settings.averaged(optimizer, [weight])[0].tolist() == [1.0]
    assert not any(optimizer.state.values()), "asked before the first step, it stays as it was"
    rates = [0.0, 0.05, 0.1, 0.1]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
    y, x = by_the_paper(1.0, 3.0, rates, beta=0.9)
    assert weight.item() == pytest.approx(y, abs=1e-9)
    assert settings.averaged(optimizer, [weight])[0].item() == pytest.approx(x, abs=1e-9)


class Looks(AbstractHook):
    """Keeps the weights that an evaluation would see, and those after it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def after_step(self, run, outcome):
        before = weights(run)
        with inspecting(run):
            self.seen.append(weights(run))
        assert torch.equal(weights(run), before)
        return {}


def test_schedule_free_is_evaluated_saved_and_exported_at_its_average(tmp_path):
    settings = {"optimizer": made("schedule_free"), "optimizer_steps": 4}
    hook = Looks()
    trainer = toy_trainer(tmp_path / "looked-at", hooks=[hook], **settings)
    trainer.fit()
    alone = toy_trainer(tmp_path / "alone", **settings)
    alone.fit()
    assert torch.equal(weights(trainer), weights(alone)), "who looks changes nothing"
    averaged = settings["optimizer"].averaged(trainer.optimizer.optimizer, trainer.parameters)
    flat = torch.cat([value.flatten() for value in averaged])
    assert torch.equal(hook.seen[-1], flat) and not torch.equal(flat, weights(trainer))
    trainer.export(tmp_path / "final")
    for file in (
        tmp_path / "final/weights",
        tmp_path / "looked-at/checkpoint-4/average.safetensors",
    ):
        saved = load_file(file)
        names = trainer.named_parameters
        assert torch.equal(torch.cat([saved[name].flatten() for name in names]), flat)


@pytest.mark.parametrize(
    ("kind", "package", "install"),
    [
        ("adamw_8bit", "bitsandbytes", r"pip install 'diffalign\[bitsandbytes\]'"),
        ("paged_adamw_8bit", "bitsandbytes", r"pip install 'diffalign\[bitsandbytes\]'"),
        ("prodigy", "prodigyopt", r"pip install 'diffalign\[prodigy\]'"),
        ("schedule_free", "schedulefree", r"pip install 'diffalign\[schedulefree\]'"),
    ],
)
def test_a_missing_package_is_told_with_its_command(monkeypatch, kind, package, install):
    monkeypatch.setitem(sys.modules, package, None)
    settings = components.find(AbstractOptimizer, kind)(lr=1.0)
    with pytest.raises(ConfigError, match=rf"optimizer.kind {kind} needs {package}.*{install}"):
        settings.check()


def test_paging_without_a_gpu_is_refused(monkeypatch):
    found("paged_adamw_8bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no such device: set optimizer.kind=adamw_8bit"):
        made("paged_adamw_8bit").check()


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    return config.load(RunConfig, ROOT / "configs/smoke/diffusion_dpo_sdxl.yaml", overrides)


def test_a_section_without_a_kind_is_adamw(tmp_path):
    run = loaded(tmp_path)
    assert isinstance(run.optimizer, AdamW)
    assert config.to_dict(run)["optimizer"]["kind"] == "adamw"
    run = loaded(tmp_path, "optimizer.kind=adamw_8bit")
    assert isinstance(run.optimizer, AdamW8bit)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.kind=adafactor", "optimizer.betas=[0.9, 0.95]"], "betas is not a field"),
        (["optimizer.kind=prodigy"], "lr must be between 0.1 and 10, got 0.0001: prodigy finds"),
        (
            ["optimizer.kind=schedule_free", "optimizer.schedule=cosine"],
            "schedule is cosine, and schedule_free has its averaging",
        ),
        (["optimizer.kind=schedule_free", "optimizer.betas=[0, 0.9]"], "must be above 0"),
        (["optimizer.kind=lion"], "kinds: adafactor, adamw, adamw_8bit"),
        (["optimizer.slice_p=2"], "slice_p is not a field of AdamW"),
    ],
)
def test_what_a_kind_cannot_use_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, *overrides)


def test_a_second_average_is_refused(tmp_path):
    found("schedule_free")
    run = loaded(tmp_path, "optimizer.kind=schedule_free", "training.ema_decay=0.99")
    with pytest.raises(ConfigError, match="schedule_free averages the weights itself"):
        check(run)


def test_prodigy_has_one_step_size_for_all(tmp_path, monkeypatch):
    found("prodigy")
    run = loaded(tmp_path, "optimizer={kind: prodigy}")
    monkeypatch.setattr(type(run.model), "own_rates", {"model.projector_lr": 1e-5})
    with pytest.raises(ConfigError, match=r"model.projector_lr is 1e-05, and optimizer.kind prod"):
        check(run)
    model = VLM(path="somewhere", projector="train", projector_lr=1e-5)
    assert model.own_rates == {"model.projector_lr": 1e-5}


def test_an_old_adafactor_run_goes_on_without_the_keys_that_it_never_read(tmp_path):
    before = ["optimizer.betas=[0.9, 0.999]", "optimizer.eps=1.0e-08"]
    run = loaded(tmp_path, "optimizer.kind=adafactor", *before)
    assert run.optimizer == Adafactor(lr=1e-4)
    ours = {"optimizer.kind": "adafactor"}
    saved = {**ours, "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8}
    refuse_other_run(tmp_path, saved, ours)
    with pytest.raises(CheckpointError, match=r"optimizer\.betas"):
        refuse_other_run(tmp_path, saved, {**saved, "optimizer.betas": [0.9, 0.99]})


def test_an_optimiser_of_your_own_is_a_file(tmp_path):
    file = tmp_path / "plain_sgd.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from diffalign.training.optimizers.base import AbstractOptimizer\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class PlainSGD(AbstractOptimizer):\n"
        "    momentum: float = 0.9\n\n"
        "    def build(self, parameters):\n"
        "        return torch.optim.SGD(\n"
        "            parameters, lr=self.lr, momentum=self.momentum,"
        " weight_decay=self.weight_decay\n"
        "        )\n"
    )
    run = loaded(tmp_path, f"optimizer.kind={file}", "optimizer.momentum=0.5")
    check(run)
    trainer = toy_trainer(tmp_path / "run", optimizer=run.optimizer)
    assert trainer.fit()
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_rates_of_prodigy_have_its_own_bounds():
    assert Prodigy().lr == 1.0
    with pytest.raises(ValueError, match="change d_coef for larger or smaller steps"):
        Prodigy(lr=1e-4)
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        ScheduleFree(lr=1.0, weight_decay=-1.0)
