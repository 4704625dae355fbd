from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign import world
from diffalign.objectives.aot import AOT, ranks
from diffalign.objectives.base import Likelihoods, StepTotals
from diffalign.objectives.dpo import DPO
from tests.objectives.fixtures import denoised_pairs, denoised_views
from tests.objectives.responses import numbers, plain, responses, row_of

SIDES = ("chosen", "rejected")
PUBLISHED = {
    # TRL's DPOTrainer: settings, mean loss, its slopes in a token of each response.
    "paired": (
        AOT(beta=0.5),
        0.579681639071,
        [-0.071946669420, -0.082291720917, -0.064893461008],
        [0.071946669420, 0.082291720917, 0.064893461008],
    ),
    "paired, smoothed": (
        AOT(beta=0.5, label_smoothing=0.1),
        0.604681639071,
        [-0.055280002754, -0.065625054250, -0.048226794342],
        [0.055280002754, 0.065625054250, 0.048226794342],
    ),
    "paired .1": (
        AOT(beta=0.1),
        0.668611634164,
        [-0.016208448837, -0.016625000087, -0.015917172507],
        [0.016208448837, 0.016625000087, 0.015917172507],
    ),
    "unpaired": (
        AOT(beta=0.5, form="unpaired"),
        0.576759541029,
        [-0.068897070180, -0.077095025776, -0.072970583186],
        [0.077095025776, 0.072970583186, 0.068897070180],
    ),
    "unpaired, smoothed": (
        AOT(beta=0.5, form="unpaired", label_smoothing=0.1),
        0.601759541029,
        [-0.052230403514, -0.060428359109, -0.056303916519],
        [0.060428359109, 0.056303916519, 0.052230403514],
    ),
}


def in_parts(views: dict[str, Likelihoods], sizes: list[int]) -> list[dict[str, Likelihoods]]:
    """The pairs as micro-batches of one step."""
    cut = {
        name: list(zip(view.policy.split(sizes), view.reference.split(sizes), strict=True))
        for name, view in views.items()
    }
    totals = {
        name: StepTotals.of([Likelihoods(*part) for part in parts], step=0, every_row=True)
        for name, parts in cut.items()
    }
    return [
        {name: Likelihoods(*cut[name][n], whole_step=totals[name]) for name in cut}
        for n in range(len(sizes))
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_and_gradients(name):
    objective, mean, *slopes = PUBLISHED[name]
    views = responses()
    loss = objective(views).loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(mean, abs=1e-10)
    for side, known in zip(SIDES, slopes, strict=True):
        assert views[side].policy.grad.tolist() == pytest.approx(known, abs=1e-10)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_in_micro_batches_has_the_loss_and_the_gradient_of_the_whole(name):
    objective, mean, *slopes = PUBLISHED[name]
    views = {side: responses()[side] for side in SIDES}
    losses = [objective(part).loss for part in in_parts(views, [1, 2])]
    torch.cat(losses).mean().backward()
    assert torch.cat(losses).mean().item() == pytest.approx(mean, abs=1e-10)
    for side, known in zip(SIDES, slopes, strict=True):
        assert views[side].policy.grad.tolist() == pytest.approx(known, abs=1e-10)


def test_ranks_are_those_among_the_rows_of_all_processes(monkeypatch):
    views = {side: responses()[side] for side in SIDES}
    here, elsewhere = (
        {side: Likelihoods(view.policy[rows], view.reference[rows]) for side, view in views.items()}
        for rows in ([0], [1, 2])
    )
    whole = AOT(beta=0.5)(views).loss.mean().item()
    losses = []
    for own, others in ((here, elsewhere), (elsewhere, here)):
        sides = iter(SIDES)

        def with_others(rows, others=others, sides=sides):
            view = others[next(sides)]
            return torch.cat([rows, torch.stack([view.policy, view.reference], dim=1).detach()])

        monkeypatch.setattr(world, "joined", with_others)
        losses.append(AOT(beta=0.5)(own).loss)
    assert torch.cat(losses).mean().item() == pytest.approx(whole)


def test_one_pair_a_step_is_dpo():
    each = [0.474076984180, 0.798138869382, 0.493248945997]
    for row, known in enumerate(each):
        alone = row_of(responses(), row)
        assert AOT(beta=0.5)(alone).loss.item() == pytest.approx(known, abs=1e-10)
        assert DPO(beta=0.5)(alone).loss.item() == pytest.approx(known, abs=1e-10)


def test_it_compares_denoising_errors_as_well():
    views = denoised_views(*denoised_pairs(torch.float64), SIDES)
    chosen, rejected = (views[side] for side in SIDES)
    by_hand = (chosen.policy - rejected.policy).sort().values - (
        chosen.reference - rejected.reference
    ).sort().values
    expected = -torch.nn.functional.logsigmoid(5000.0 * by_hand).mean()
    assert AOT(beta=5000.0)(views).loss.mean().item() == pytest.approx(expected.item())


def test_the_rank_of_a_value_that_was_rounded_is_that_of_its_copy():
    everyone = numbers([-1.0, 0.0, 0.5, 2.0])
    assert ranks(everyone, everyone).tolist() == [0, 1, 2, 3]
    for rounding in (-1e-12, 1e-12):
        assert ranks(everyone + rounding, everyone).tolist() == [0, 1, 2, 3]


def test_equal_values_share_a_rank_and_are_finite():
    same = {side: plain([0.5, 0.5], [0.1, 0.1]) for side in SIDES}
    assert AOT(beta=1.0)(same).loss.tolist() == pytest.approx([0.6931471805599453] * 2)


def test_a_label_as_good_as_none_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 0\.5"):
        dataclasses.replace(AOT(beta=1.0), label_smoothing=0.5)
