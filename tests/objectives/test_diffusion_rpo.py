from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from diffalign.objectives.diffusion_rpo import DiffusionRPO, contrastive_weights
from diffalign.objectives.dpo import DPO
from tests.objectives.fixtures import denoised_pairs, denoised_views, normal
from tests.objectives.responses import numbers, plain

SIDES = ("chosen", "rejected")
KNOWN = {
    # The formula outside the logarithm, and the authors' trainer for language models inside it:
    # weight, temperature -> loss and norm of its gradient in the predictions.
    ("outside", 0.1): (0.483545239909, 11.338952248277),
    ("outside", 0.5): (0.492308711862, 9.944045621821),
    ("inside", 0.1): (0.620290536085, 3.774727804986),
    ("inside", 0.5): (0.545773371752, 3.364556356791),
}


def about(views, embedding):
    return {side: dataclasses.replace(view, embedding=embedding) for side, view in views.items()}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("weight", "temperature"), KNOWN)
def test_values_and_gradients(weight, temperature, dtype, within):
    policy, reference, target = denoised_pairs(dtype)
    policy.requires_grad_()
    views = about(denoised_views(policy, reference, target, SIDES), normal(80, 3, 8).to(dtype))
    objective = DiffusionRPO(beta=5000.0, temperature=temperature, weight=weight)
    loss = objective(views).loss.mean()
    loss.backward()
    expected, norm = KNOWN[weight, temperature]
    assert loss.item() == pytest.approx(expected, abs=within)
    assert policy.grad.norm().item() == pytest.approx(norm, rel=10 * within)


def test_samples_about_nothing_alike_are_dpo_outside_and_not_inside():
    views = about(
        denoised_views(*denoised_pairs(torch.float64), SIDES), torch.eye(3, dtype=torch.float64)
    )
    sharp = {"beta": 5000.0, "temperature": 1e-3}
    dpo = DPO(beta=5000.0)(views).loss
    assert DiffusionRPO(**sharp)(views).loss.tolist() == pytest.approx(dpo.tolist())
    # Two of three comparisons have no weight, and cost log 2 each.
    inside = DiffusionRPO(**sharp, weight="inside")(views).loss
    assert inside.tolist() == pytest.approx(((dpo + 2 * math.log(2)) / 3).tolist())


def test_outside_the_floor_does_not_rise_with_the_batch_as_it_does_inside():
    floors = {"outside": [], "inside": []}
    for weight, found in floors.items():
        for batch in (2, 64):
            decided = {
                "chosen": plain([1.0] * batch, [0.0] * batch),
                "rejected": plain([-1.0] * batch, [0.0] * batch),
            }
            rows = about(decided, torch.eye(batch, dtype=torch.float64))
            objective = DiffusionRPO(beta=5.0, temperature=0.1, weight=weight)
            found.append(objective(rows).loss.mean().item())
    assert floors["outside"][0] == pytest.approx(floors["outside"][1], rel=1e-6)
    assert floors["outside"][1] < 1e-4 and floors["inside"][1] > 0.68


def test_weights_are_a_softmax_of_cosines_without_gradient():
    embedding = numbers([[2.0, 0.0], [0.0, 0.5], [3.0, 3.0]]).requires_grad_()
    weights = contrastive_weights(embedding, temperature=0.5)
    row = [math.exp(2.0), 1.0, math.exp(math.sqrt(2.0))]
    assert weights[0].tolist() == pytest.approx([each / sum(row) for each in row])
    assert not weights.requires_grad


def test_rejected_images_of_other_prompts_get_a_gradient():
    rows = {
        "chosen": plain([0.2, 0.1], [0.0, 0.0]),
        "rejected": plain([0.1, 0.3], [0.0, 0.0]),
    }
    output = DiffusionRPO(beta=1.0)(about(rows, torch.ones(2, 3, dtype=torch.float64)))
    output.loss[0].backward()
    assert (rows["rejected"].policy.grad > 0).all()
    assert output.metrics["own_weight"].tolist() == pytest.approx([0.5, 0.5])


def test_one_pair_in_a_micro_batch_is_dpo_and_the_run_is_told():
    rows = {"chosen": plain([0.2], [0.0]), "rejected": plain([0.1], [0.0])}
    alone = about(rows, torch.ones(1, 3))
    for weight in ("outside", "inside"):
        objective = DiffusionRPO(beta=1.0, weight=weight)
        assert objective(alone).loss.item() == pytest.approx(DPO(beta=1.0)(alone).loss.item())
        assert "samples_per_device" in objective.note()
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        DiffusionRPO(beta=1.0, temperature=0.0)
