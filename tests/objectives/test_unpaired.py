"""Losses of rows that have one response each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign import components
from diffalign.objectives.base import AbstractObjective
from diffalign.objectives.bco import BCO
from diffalign.objectives.kto import KTO
from diffalign.objectives.npo import NPO
from diffalign.objectives.sft import SFT
from tests.objectives.responses import CHOSEN, REJECTED, plain, summed

TAKES = {"kto", "bco", "npo", "sft"}


def apart(views, chosen_rows=(0, 2, 4), rejected_rows=(1, 3, 5)):
    """The three pairs as six samples."""
    rows = {"chosen": chosen_rows, "rejected": rejected_rows}
    return {name: dataclasses.replace(views[name], rows=torch.tensor(rows[name])) for name in rows}


def pairs():
    return {"chosen": summed(*CHOSEN), "rejected": summed(*REJECTED)}


def nothing():
    empty = torch.zeros(0, dtype=torch.float64)
    return dataclasses.replace(plain([], []), length=empty, rows=empty.long())


def test_those_that_take_unpaired_rows_say_so():
    found = {
        kind
        for kind in components.kinds(AbstractObjective)
        if getattr(components.find(AbstractObjective, kind), "takes_unpaired", False) is True
    }
    assert found == TAKES


def test_kto_is_that_of_trl():
    # TRL's KTOTrainer on these six samples: desirable ones first, an estimated KL of 0.05.
    expected = [0.431680, 0.518741, 0.407333, 0.443986, 0.531209, 0.481259]
    views = {**apart(pairs()), "mismatched": plain([0.05], [0.0])}
    output = KTO(beta=0.5, baseline="mismatched")(views)
    assert output.loss.tolist() == pytest.approx(expected, abs=1e-6)
    weighted = KTO(beta=0.5, baseline="mismatched", undesirable_weight=1.5)(views)
    assert weighted.loss.mean().item() == pytest.approx(0.590406, abs=1e-6)


def test_bco_is_that_of_trl():
    # TRL's BCOTrainer: the running mean takes the batch in first, and so is 0.0916667.
    expected = [0.594396, 0.766487, 0.550817, 0.557910, 0.722739, 0.624820]
    output = BCO(beta=0.5)(apart(pairs()))
    assert output.loss.tolist() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["delta"].item() == pytest.approx(0.0916667, abs=1e-6)


@pytest.mark.parametrize("objective", [KTO(beta=0.5), BCO(beta=0.5)])
def test_as_many_of_either_kind_have_the_mean_and_the_gradient_of_pairs(objective):
    together, single = pairs(), apart(pairs())
    fresh = dataclasses.replace(objective)
    first, second = objective(together), fresh(single)
    assert first.loss.mean().item() == pytest.approx(second.loss.mean().item())
    first.loss.mean().backward()
    second.loss.mean().backward()
    for name in together:
        assert torch.allclose(together[name].policy.grad, single[name].policy.grad)


@pytest.mark.parametrize("objective", [KTO(beta=0.5), BCO(beta=0.5)])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_batch_may_have_one_kind_alone(objective, side):
    views = {**apart(pairs()), side: nothing()}
    output = dataclasses.replace(objective)(views)
    assert output.loss.shape == (3,) and output.loss.isfinite().all()
    assert "accuracy" not in output.metrics and "margin" not in output.metrics
    output.loss.mean().backward()
    other = views["rejected" if side == "chosen" else "chosen"]
    assert (other.policy.grad != 0).all()


@pytest.mark.parametrize(("objective", "side"), [(NPO(beta=0.5), "rejected"), (SFT(), "chosen")])
def test_what_reads_one_side_reads_it_as_ever(objective, side):
    found = objective({side: apart(pairs())[side]}).loss
    assert found.tolist() == objective({side: pairs()[side]}).loss.tolist()


def test_the_direction_is_that_of_the_label():
    for objective in (KTO(beta=1.0), BCO(beta=1.0)):
        views = apart({"chosen": plain([0.0], [0.0]), "rejected": plain([0.0], [0.0])}, [0], [1])
        objective(views).loss.sum().backward()
        assert views["chosen"].policy.grad.item() < 0 < views["rejected"].policy.grad.item()
