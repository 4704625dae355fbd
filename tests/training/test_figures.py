from __future__ import annotations

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.training.figures import (
    Subset,
    bands_of,
    displacement_figures,
    length_figures,
    margin_figures,
    model_figures,
)
from diffalign.training.metrics import Metrics

GOOD = torch.tensor(True)


def test_a_denoiser_tells_its_errors_and_its_drift():
    chosen = Likelihoods(torch.tensor([-0.1, -0.2]), torch.tensor([-0.05, -0.3]))
    found = model_figures({"chosen": chosen}, "denoising error")
    assert found.keys() == {"drift/chosen", "error/chosen"}
    assert found["error/chosen"].tolist() == pytest.approx([0.2, 0.4])
    assert found["drift/chosen"].tolist() == pytest.approx([-0.05, 0.1])


def test_responses_tell_their_log_probability_per_token_and_their_length():
    view = Likelihoods(torch.tensor([-8.0, -3.0]), length=torch.tensor([4.0, 6.0]))
    found = model_figures({"rejected": view}, "token log-probability")
    assert {name: values.tolist() for name, values in found.items()} == {
        "log_prob/rejected": [-2.0, -0.5],
        "tokens/rejected": [4.0, 6.0],
    }


def test_displacement_of_three_pairs_is_that_of_the_reference_values():
    chosen = Likelihoods(
        torch.tensor([-2.5, -1.1, -4.4]),
        torch.tensor([-3.1, -1.0, -5.2]),
        length=torch.tensor([3.0, 2, 4]),
    )
    rejected = Likelihoods(
        torch.tensor([-4.0, -1.65, -1.15]),
        torch.tensor([-3.6, -1.95, -1.05]),
        length=torch.tensor([4.0, 3, 2]),
    )
    views = {"chosen": chosen, "rejected": rejected}
    found = model_figures(views, "token log-probability")
    assert found["drift/chosen"].mean().item() == pytest.approx(0.433333333333)
    assert chosen.policy.mean().item() == pytest.approx(-2.666666666667)
    assert found["fell/chosen"].tolist() == [0, 1, 0]
    assert found["fell/rejected"].tolist() == [1, 0, 1]
    # The second pair's chosen response fell, but its margin is negative: nothing was told apart.
    assert displacement_figures(views)["displaced"].tolist() == [0, 0, 0]
    further = Likelihoods(torch.tensor([-4.0, -2.5, -1.15]), rejected.reference, rejected.length)
    views = {"chosen": chosen, "rejected": further}
    assert displacement_figures(views)["displaced"].tolist() == [0, 1, 0]


def test_nothing_is_displaced_without_a_reference_or_pairs_of_responses():
    free = Likelihoods(torch.zeros(2), length=torch.ones(2))
    assert displacement_figures({"chosen": free, "rejected": free}) == {}
    image = Likelihoods(torch.zeros(2), torch.zeros(2))
    assert displacement_figures({"chosen": image, "rejected": image}) == {}


def test_figures_carry_no_gradient():
    policy = torch.tensor([-1.0], requires_grad=True)
    view = Likelihoods(policy, torch.tensor([-1.0]))
    assert not any(
        values.requires_grad for values in model_figures({"a": view}, "denoising error").values()
    )


def test_a_logit_beyond_four_is_saturated_and_on_the_wrong_side_far_off():
    margins = torch.tensor([4.5, 3.9, -4.5, -3.9, 0.0, 9.0, 1.0, 1.0])
    found = margin_figures({"margin": margins, "loss": margins, "image/margin": -margins}, None)
    means = {name: values.mean().item() for name, values in found.items()}
    assert means == {
        "saturated": 3 / 8,
        "far_off": 1 / 8,
        "image/saturated": 3 / 8,
        "image/far_off": 2 / 8,
    }


def test_a_margin_against_a_label_that_is_more_likely_wrong_is_on_the_right_side():
    margins, preference = torch.tensor([-9.0, -9.0, -9.0]), torch.tensor([0.9, 0.1, 0.5])
    found = margin_figures({"margin": margins, "preference": preference}, None)
    assert found["far_off"].tolist() == [1.0, 0.0, 0.0]
    assert found["saturated"].tolist() == [1.0, 1.0, 1.0]


def test_margins_are_told_by_quarters_of_the_schedule():
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.999, 1.0], dtype=torch.float64)
    margins = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    metrics = Metrics()
    metrics.add(margin_figures({"margin": margins}, noise))
    metrics.commit(GOOD)
    found = metrics.reduce()
    # None is between 50 and 75 %: a figure without a value is left out.
    assert found.pop("saturated") == pytest.approx(3 / 5) and found.pop("far_off") == 0
    assert found == {
        "margin/noise_0-25": 2.0,
        "margin/noise_25-50": 5.0,
        "margin/noise_75-100": 8.0,
    }


def test_every_sample_is_in_one_part_of_the_schedule():
    bands = bands_of(torch.linspace(0, 1, 21))
    assert bands.sum(dim=0).tolist() == [1.0] * 21


def test_rows_that_do_not_count_are_not_added_even_where_they_are_not_finite():
    metrics = Metrics()
    metrics.add({"a": Subset(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0]))})
    metrics.add({"a": Subset(torch.tensor([2.0, 6.0]), torch.tensor([1.0, 1.0]))})
    metrics.commit(GOOD)
    assert metrics.reduce() == {"a": 3.0}


def test_accuracy_is_told_where_the_chosen_response_is_shorter_and_where_it_is_longer():
    chosen = Likelihoods(
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]),
        torch.zeros(5),
        length=torch.tensor([2.0, 2.0, 9.0, 9.0, 5.0]),
    )
    rejected = Likelihoods(
        torch.tensor([-1.0, -1.0, 1.0, 0.0, -1.0]), torch.zeros(5), length=torch.full((5,), 5.0)
    )
    metrics = Metrics()
    metrics.add(length_figures({"chosen": chosen, "rejected": rejected}))
    metrics.commit(GOOD)
    # Both shorter ones are preferred, of the longer ones none and half; equal lengths do not count.
    found = metrics.reduce()
    assert found.pop("chosen_longer") == pytest.approx(2 / 5)
    assert found == {"accuracy/chosen_shorter": 1.0, "accuracy/chosen_longer": 0.25}


def test_no_lengths_are_compared_where_there_are_no_tokens_or_no_pairs():
    row = Likelihoods(torch.zeros(2))
    assert length_figures({"chosen": row, "rejected": row}) == {}
    single = Likelihoods(torch.zeros(2), length=torch.ones(2), rows=torch.tensor([0, 1]))
    assert length_figures({"chosen": single, "rejected": single}) == {}
    assert length_figures({"chosen": row}) == {}
