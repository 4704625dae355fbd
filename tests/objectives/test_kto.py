from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from diffalign import config, world
from diffalign.errors import ConfigError
from diffalign.objectives.base import AbstractObjective, Likelihoods
from diffalign.objectives.kto import KTO, kto_loss
from tests.objectives.fixtures import denoised_pairs, denoised_views, normal
from tests.objectives.responses import numbers, plain, responses


@dataclass(frozen=True, kw_only=True)
class Run:
    """The section of a run that is tested."""

    objective: AbstractObjective


def log_ratios(chosen: list[float], rejected: list[float]) -> dict[str, Likelihoods]:
    return {
        side: plain(values, [0.0] * len(values))
        for side, values in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_diffusion_kto_published_by_the_authors_code(dtype, within):
    # Six images, of which three are desirable; their beta of 1000 is of errors not halved.
    views = denoised_views(*denoised_pairs(dtype), ("chosen", "rejected"))
    loss = KTO(beta=2000.0)(views).loss.mean()
    assert loss.item() == pytest.approx(0.425722807033, abs=within)


UTILITIES = {
    # The authors' functions: loss and norm of its gradient in the predictions, with their offset
    # held at 0 (their default), of the class means ("sigmoid"), of other prompts ("original").
    "sigmoid": (
        (0.425722807033, 1.087184153449),
        (0.426553964489, 1.092219194398),
        (0.450224617040, 1.066236156712),
    ),
    "loss_averse": (
        (1.618302076871, 2.382274534885),
        (1.617658847320, 2.382010087053),
        (1.687884575076, 2.558207971767),
    ),
    "risk_seeking_1": (
        (0.761361268481, 2.606030994751),
        (0.758395362494, 2.643594755218),
        (0.703809907573, 3.469447561449),
    ),
    "risk_seeking_2": (
        (1.996386240282, 0.050873236211),
        (1.996384788946, 0.050893667615),
        (1.996352930076, 0.051342165562),
    ),
    "risk_seeking_3": (
        (0.023040267857, 3.066059201848),
        (0.023683497408, 3.059445471100),
        (-0.046542230348, 3.013928440313),
    ),
}
OFFSETS = {
    "default": ({}, 0.0),
    "sigmoid": ({"baseline": "classes", "clamp_baseline": False}, -4.0153337228e-05),
    "original": ({"baseline": "mismatched", "clamp_baseline": False}, -9.17538125467e-04),
}


def mismatched_images(dtype: torch.dtype) -> Likelihoods:
    """Six images next to other prompts; as their log-ratio is half of the authors' reward."""
    errors = (0.01 * normal(seed, 6, 4, 8, 8).to(dtype).square() for seed in (3, 4))
    return Likelihoods(*(-0.5 * error.flatten(start_dim=1).mean(dim=1) for error in errors))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_published_utilities_and_offsets(utility, offset, dtype, within):
    settings, z = OFFSETS[offset]
    policy, reference, target = denoised_pairs(dtype)
    policy.requires_grad_()
    views = denoised_views(policy, reference, target, ("chosen", "rejected"))
    output = KTO(beta=2000.0, utility=utility, **settings)(
        {**views, "mismatched": mismatched_images(dtype)}
    )
    output.loss.mean().backward()
    # Their class means have 1e-6 added to what they divide by, which 2000 times a gain shows.
    within = max(within, 1e-7 if offset == "sigmoid" else 0.0)
    loss, norm = UTILITIES[utility][list(OFFSETS).index(offset)]
    assert 2 * output.metrics["baseline"].item() == pytest.approx(z, abs=min(within, 1e-9))
    assert output.loss.mean().item() == pytest.approx(loss, abs=within)
    assert policy.grad.norm().item() == pytest.approx(norm, rel=10 * within)


def test_the_offset_of_class_means_is_exactly_the_authors_with_what_they_add():
    chosen, rejected = (
        view.log_ratio
        for view in denoised_views(*denoised_pairs(torch.float64), ("chosen", "rejected")).values()
    )
    z = sum(2 * side.sum() / (3 + 1e-6) for side in (chosen, rejected)) / 4
    losses = [
        kto_loss(side, z, beta=2000.0, desirable=side is chosen, utility="sigmoid")
        for side in (chosen, rejected)
    ]
    assert torch.cat(losses).mean().item() == pytest.approx(0.426553964489, abs=1e-10)


def test_single_images_of_unequal_classes_and_weights():
    policy, reference, target = denoised_pairs(torch.float64)
    policy.requires_grad_()
    (view,) = denoised_views_of_all(policy, reference, target)
    rows = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    views = {
        name: Likelihoods(view.policy[index], view.reference[index], rows=index)
        for name, index in zip(("chosen", "rejected"), rows, strict=True)
    }
    loss = KTO(beta=2000.0, undesirable_weight=2.0)(views).loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.601735429346, abs=1e-10)
    assert policy.grad.norm().item() == pytest.approx(1.594267458090, abs=1e-9)


def denoised_views_of_all(*fixture: torch.Tensor) -> list[Likelihoods]:
    """All six images as one view."""
    sides = denoised_views(*fixture, ("chosen", "rejected"))
    return [
        Likelihoods(
            torch.cat([side.policy for side in sides.values()]),
            torch.cat([side.reference for side in sides.values()]),
        )
    ]


def test_class_means_count_classes_alike():
    views = {
        "chosen": Likelihoods(numbers([3.0]), numbers([0.0]), rows=torch.tensor([0])),
        "rejected": Likelihoods(
            numbers([1.0] * 3), numbers([0.0] * 3), rows=torch.tensor([1, 2, 3])
        ),
    }
    assert KTO(beta=1.0, baseline="classes")(views).metrics["baseline"].item() == 2.0
    assert KTO(beta=1.0)(views).metrics["baseline"].item() == 1.5
    empty = {**views, "chosen": Likelihoods(numbers([]), numbers([]), rows=torch.tensor([]).long())}
    assert KTO(beta=1.0, baseline="classes")(empty).metrics["baseline"].item() == 0.5


def test_whether_the_baseline_may_be_negative_is_said_for_all_alike():
    falling = {**log_ratios([-3.0], [-1.0]), "mismatched": plain([-2.0], [0.0])}
    for baseline in ("batch", "classes", "mismatched"):
        held, free = (
            KTO(beta=1.0, baseline=baseline, clamp_baseline=clamp)(falling)
            for clamp in (True, False)
        )
        assert (held.metrics["baseline"].item(), free.metrics["baseline"].item()) == (0.0, -2.0)


def test_two_utilities_have_the_same_gradient_in_undesirable_samples():
    slopes = []
    for utility in ("risk_seeking_1", "loss_averse"):
        ratio = numbers([-0.3, 0.0, 2.0]).requires_grad_()
        loss = kto_loss(ratio, numbers([0.1])[0], beta=2.0, desirable=False, utility=utility)
        loss.sum().backward()
        slopes.append(ratio.grad)
    assert torch.equal(*slopes)


def test_a_run_is_told_of_an_unbounded_loss_and_of_the_hidden_division():
    assert KTO(beta=1.0).note() == ""
    assert KTO(beta=1.0, utility="loss_averse").note().endswith("the loss is not bounded")
    assert "divided by 100" in KTO(beta=1.0, utility="risk_seeking_2").note()


def test_an_unknown_utility_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"objective\.utility.*risk_seeking_3"):
        config.load(Run, None, ["objective={kind: kto, beta: 1, utility: risk_seeking_4}"])


def test_value_and_gradient_worked_by_hand():
    ratio = numbers([0.5]).requires_grad_()
    loss = kto_loss(ratio, numbers([0.5])[0], beta=2.0, desirable=True)
    loss.backward()
    assert loss.item() == 0.5
    assert ratio.grad.item() == pytest.approx(-2.0 * 0.25)


def test_the_baseline_is_the_mean_gain_of_both_sides_and_has_no_gradient():
    views = log_ratios([3.0, 1.0], [0.0, 2.0])
    output = KTO(beta=1.0)(views)
    output.loss.sum().backward()
    assert output.metrics["baseline"].item() == pytest.approx(1.5)
    slopes = torch.sigmoid(numbers([1.5, -0.5])) * torch.sigmoid(numbers([-1.5, 0.5]))
    assert views["chosen"].policy.grad.tolist() == pytest.approx((-slopes / 2).tolist())


def test_a_loss_on_average_is_no_baseline():
    assert KTO(beta=1.0)(log_ratios([-3.0], [-1.0])).metrics["baseline"].item() == 0.0


def test_the_baseline_is_that_of_all_ranks(monkeypatch):
    # Elsewhere, a row of each side with a log-ratio of 4.
    elsewhere = torch.tensor([1.0, 0.0, 0.0, 4.0])
    monkeypatch.setattr(world, "total", lambda mine: mine + elsewhere)
    assert KTO(beta=1.0)(log_ratios([3.0], [1.0])).metrics["baseline"].item() == 3.0


def test_mismatched_responses_are_asked_for_and_not_trained():
    objective = KTO(beta=1.0, baseline="mismatched")
    assert objective.views == {"chosen", "rejected", "mismatched"}
    mismatched = plain([0.3], [0.0])
    objective({**responses(), "mismatched": mismatched}).loss.sum().backward()
    assert mismatched.policy.grad is None


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        KTO(beta=1.0, **{name: -1.0})
