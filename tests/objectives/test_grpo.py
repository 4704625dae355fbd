"""Values and gradients of TRL 1.16 (`GRPOTrainer._compute_loss`) on six sampled responses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from diffalign.objectives.base import Likelihoods, StepTotals
from diffalign.objectives.grpo import GRPO, clipped_loss, token_kl
from tests.objectives.responses import sampled_responses

TOKEN_LEVEL = {
    "grpo": -0.048427399757,
    "bnpo": -0.137787575269,
    "dr_grpo": -0.051670340726,
    "dapo": -0.137787575269,
    "cispo": 0.181823506696,
    "sapo": -0.103288800726,
    "luspo": -0.413362725808,
    "vespo": 0.069956750931,
}
SEQUENCE_LEVEL = {
    "grpo": -0.074779479708,
    "bnpo": -0.157062002104,
    "dr_grpo": -0.058898250789,
    "dapo": -0.157062002104,
    "sapo": -0.107570795871,
    "luspo": -0.471186006312,
}
OTHERS = {
    "ratios held at 1.2": ({"form": "cispo", "cap": 1.2}, 0.180069103395),
    "ratios held at 1.2, of sequences": (
        {"form": "cispo", "cap": 1.2, "importance": "sequence"},
        0.189422483459,
    ),
    "a cap below every ratio": ({"form": "cispo", "cap": 0.2}, 0.028838933468),
    "divided by 512": ({"form": "dr_grpo", "max_length": 512}, -0.000807349074),
    "clipped higher above": ({"form": "dapo", "clip_high": 0.28}, -0.144780778620),
    "two-sided": ({"form": "grpo", "delta": 1.1}, -0.032679803771),
    "GSPO": (
        {"form": "grpo", "importance": "sequence", "clip": 3e-4, "clip_high": 4e-4},
        0.002279917589,
    ),
    "kl": ({"form": "grpo", "beta": 0.04, "weighted_kl": False}, -0.047796742776),
    "weighted kl": ({"form": "grpo", "beta": 0.04}, -0.047794392354),
    "kl of dapo": ({"form": "dapo", "beta": 0.04, "weighted_kl": False}, -0.137216621100),
    "weighted kl of dapo": ({"form": "dapo", "beta": 0.04}, -0.137201932876),
    "kl of sequences": (
        {"form": "grpo", "importance": "sequence", "beta": 0.04, "weighted_kl": False},
        -0.074148822728,
    ),
    "weighted kl of sequences": (
        {"form": "grpo", "importance": "sequence", "beta": 0.04},
        -0.074174303914,
    ),
    "off policy": ({"form": "grpo", "off_policy": 0.05}, -0.347107221707),
}
ON_POLICY = {
    "grpo": ({"form": "grpo"}, 0.0),
    "dapo": ({"form": "dapo"}, -0.096779103940),
    "cispo": ({"form": "cispo"}, 0.144194667342),
    "bnpo with a divergence": ({"form": "bnpo", "beta": 0.04}, -0.096208149770),
    "plain": ({"form": "bnpo", "beta": 0.04, "weighted_kl": False}, -0.096208149770),
}
GRADIENTS = {
    # Of the mean loss, by response, in the log-probabilities of its tokens.
    "grpo": (
        {"form": "grpo"},
        [
            [0, -0.053885918, 0],
            [0.079462102, 0],
            [0.006217606, 0.010251099, 0.006536389, 0.007594201],
            [0, 0.092088368],
            [-0.061392245, 0, -0.052840795],
            [0, 0, 0, 0],
        ],
    ),
    "dapo": (
        {"form": "dapo"},
        [
            [0, -0.053885918, 0],
            [0.052974735, 0],
            [0.008290141, 0.013668132, 0.008715186, 0.010125601],
            [0, 0.061392245],
            [-0.061392245, 0, -0.052840795],
            [0, 0, 0, 0],
        ],
    ),
    "sequences": (
        {"form": "grpo", "importance": "sequence"},
        [
            [-0.065816409] * 3,
            [0.066705019] * 2,
            [0.007499864] * 4,
            [0.071718493] * 2,
            [-0.061392245] * 3,
            [0] * 4,
        ],
    ),
    "cispo": (
        {"form": "cispo", "cap": 1.2},
        [
            [-0.071463779, -0.053885918, -0.071463779],
            [0.052974735, 0.037330665],
            [0.008290141, 0.010994428, 0.008715186, 0.010125601],
            [0.037236279, 0.061392245],
            [-0.061392245, -0.066660001, -0.052840795],
            [0, 0, 0, 0],
        ],
    ),
}


def built(form: str, **settings: object) -> GRPO:
    """An objective of a form, which divides by 8 tokens where it divides by a number."""
    return GRPO(form=form, **{**({"max_length": 8} if form == "dr_grpo" else {}), **settings})


def loss_of(objective: GRPO, view: Likelihoods) -> float:
    return objective({"sampled": view}).loss.mean().item()


@pytest.mark.parametrize("form", TOKEN_LEVEL)
def test_losses_with_ratios_of_tokens(form):
    found = loss_of(built(form), sampled_responses())
    assert found == pytest.approx(TOKEN_LEVEL[form], abs=1e-11)


@pytest.mark.parametrize("form", SEQUENCE_LEVEL)
def test_losses_with_ratios_of_sequences(form):
    found = loss_of(built(form, importance="sequence"), sampled_responses())
    assert found == pytest.approx(SEQUENCE_LEVEL[form], abs=1e-11)


@pytest.mark.parametrize("name", OTHERS)
def test_losses_with_other_settings(name):
    settings, expected = OTHERS[name]
    found = loss_of(GRPO(**settings), sampled_responses())
    assert found == pytest.approx(expected, abs=1e-11)


def test_loss_of_advantages_that_are_not_divided_by_their_spread():
    plain = [0.433333333333, -0.366666666667, -0.066666666667, -1.0, 1.0, 0.0]
    found = loss_of(built("dr_grpo"), sampled_responses(advantage=plain))
    assert found == pytest.approx(-0.037659487634, abs=1e-11)


@pytest.mark.parametrize("name", ON_POLICY)
def test_losses_straight_after_sampling(name):
    settings, expected = ON_POLICY[name]
    found = loss_of(GRPO(**settings), sampled_responses(old=False))
    assert found == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    settings, expected = GRADIENTS[name]
    assert gradient(GRPO(**settings), sampled_responses()) == [
        pytest.approx(row, abs=1e-9) for row in expected
    ]


def test_gradient_of_a_zero_loss_is_that_of_the_advantages():
    view = sampled_responses(old=False)
    assert view.advantage is not None
    moved = gradient(GRPO(form="grpo"), view)
    for row, advantage in zip(moved, view.advantage.tolist(), strict=True):
        assert row == pytest.approx([-advantage / (len(row) * 6)] * len(row))


@pytest.mark.parametrize(
    ("weighted", "each"), [(False, -0.059341677), (True, -0.059330927)], ids=["plain", "weighted"]
)
def test_gradient_of_the_divergence_straight_after_sampling(weighted, each):
    objective = GRPO(form="bnpo", beta=0.04, weighted_kl=weighted)
    first = gradient(objective, sampled_responses(old=False))[0]
    assert first == pytest.approx([each] * 3, abs=1e-9)


def test_estimate_of_the_divergence():
    tokens = sampled_responses().tokens
    assert tokens is not None and tokens.reference is not None
    each = token_kl(tokens.policy, tokens.reference) * tokens.weights
    assert each.sum(dim=1).tolist() == pytest.approx(
        [
            0.014512254108,
            0.040133511238,
            0.06136317731,
            0.062220978842,
            0.04281871101,
            0.035880743955,
        ],
        abs=1e-11,
    )
    assert (each.sum() / tokens.weights.sum()).item() == pytest.approx(0.014273854248, abs=1e-11)


def test_a_ratio_above_the_range_is_not_clipped_where_the_advantage_is_below_zero():
    ratio = torch.tensor([1.5], requires_grad=True)
    loss = clipped_loss(ratio, torch.tensor([-1.0]), low=0.2, high=0.2)
    loss.backward()
    assert loss.item() == 1.5
    assert ratio.grad is not None and ratio.grad.item() == 1.0


@pytest.mark.parametrize("form", TOKEN_LEVEL)
def test_a_loss_does_not_depend_on_how_a_step_is_cut(form):
    whole = sampled_responses()
    parts = [rows_of(whole, [0, 1]), rows_of(whole, [2, 3]), rows_of(whole, [4, 5])]
    step = StepTotals.of(parts, step=1)
    objective = built(form)
    cut = [loss_of(objective, dataclasses.replace(part, whole_step=step)) for part in parts]
    assert sum(cut) / 3 == pytest.approx(TOKEN_LEVEL[form], abs=1e-11)
    assert objective.must_know == (
        "counts" if form in ("bnpo", "dapo", "cispo", "vespo") else "nothing"
    )


def test_figures_of_a_step():
    figures = GRPO(form="grpo", beta=0.04)({"sampled": sampled_responses()}).metrics
    # Of 1a the first and the last of three tokens, of 1b the second of two, of 2a the first.
    assert figures["clipped"].tolist() == pytest.approx([2 / 3, 1 / 2, 0, 1 / 2, 1 / 3, 0])
    assert figures["kl"][0].item() == pytest.approx(0.014512254108 / 3)
    assert not any(values.requires_grad for values in figures.values())


def test_a_response_without_a_token_counts_for_nothing():
    view = sampled_responses()
    assert view.tokens is not None
    empty = dataclasses.replace(view.tokens, weights=torch.zeros_like(view.tokens.weights))
    view = dataclasses.replace(view, tokens=empty, length=torch.zeros(6))
    for form in TOKEN_LEVEL:
        assert loss_of(built(form), view) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"form": "cispo", "clip_high": 0.3}, "form is cispo, which has no clip_high"),
        ({"form": "grpo", "cap": 5.0}, "take cispo"),
        ({"form": "dapo", "max_length": 8}, "take dr_grpo"),
        ({"form": "dr_grpo"}, "set max_length"),
        ({"form": "vespo", "importance": "sequence"}, "leave importance out"),
    ],
)
def test_a_setting_that_a_form_does_not_read_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        GRPO(**settings)


def test_a_reference_is_needed_only_where_the_policy_is_held_near_it():
    assert not GRPO().needs_reference
    assert GRPO(beta=0.04).needs_reference


def gradient(objective: GRPO, view: Likelihoods) -> list[list[float]]:
    """Of the mean loss in the log-probability of each token of each response."""
    assert view.tokens is not None
    objective({"sampled": view}).loss.mean().backward()
    moved = view.tokens.policy.grad
    assert moved is not None
    counts = view.tokens.weights.sum(dim=1).int().tolist()
    return [row[:count].tolist() for row, count in zip(moved, counts, strict=True)]


def rows_of(view: Likelihoods, rows: list[int]) -> Likelihoods:
    """Some responses of a view."""

    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    assert view.tokens is not None
    names = [field.name for field in dataclasses.fields(view.tokens)]
    tokens = {name: some(getattr(view.tokens, name)) for name in names}
    return Likelihoods(
        view.policy[rows],
        some(view.reference),
        some(view.length),
        advantage=some(view.advantage),
        tokens=dataclasses.replace(view.tokens, **tokens),
    )
