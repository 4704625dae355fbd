"""CHES by the authors' function (`ches/ches.py`), and difficulty on three pairs."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from diffalign.likelihoods.pair_numbers import numbers_of, pair_numbers
from diffalign.models.vlm.config import VLM
from tests.objectives.responses import CHOSEN, REJECTED, numbers
from tests.responses import response_batch
from tests.tiny_vlm import tiny_llava

STATES = {
    "chosen": [[[1, 0, 2, -1], [0.5, 1, 0, 1], [3, 3, 3, 3]], [[9] * 4, [1, 1, 0, 0], [7] * 4]],
    "rejected": [[[1, 0, 2, -1], [2, -1, 1, 0], [-3, 0, 1, 2]], [[9] * 4, [0, 3, 1, -1], [5] * 4]],
}
"""Two pairs of three positions, of which the last predicts no token."""


def of_states(starts: tuple[int, int], *, padding: int = 0) -> tuple[list[float], list[float]]:
    """CHES and normalised CHES from the positions on where prompts end; with `padding` by taking
    the last row of a padded tensor for the last token, as the authors' function does."""
    sums, counts = {}, {}
    for side, pairs in STATES.items():
        padded = [[*rows, *[[0.0] * 4] * padding] for rows in pairs]
        spans = [
            torch.tensor(rows, dtype=torch.float64)[start:-1]
            for rows, start in zip(padded, starts, strict=True)
        ]
        sums[side] = torch.stack([span.sum(dim=0) for span in spans])
        counts[side] = torch.tensor([len(span) for span in spans])
    nothing = {side: torch.zeros(2) for side in STATES}
    found = numbers_of(sums, nothing, counts)
    return found["ches"].tolist(), found["ches_normalised"].tolist()


@pytest.mark.parametrize(
    ("starts", "padding", "expected", "normalised"),
    [
        ((0, 1), 0, [2.25, 1.0], [0.5625, 1.0]),
        ((0, 0), 0, [2.25, 10.0], [0.5625, 2.5]),
        # What right padding makes of it: the numbers that ours must not be.
        ((0, 0), 1, [-51.25, -52.0], [-5.694444444444, -13.0]),
    ],
)
def test_published_values(starts, padding, expected, normalised):
    if padding:
        starts = (0, 1)
    found = of_states(starts, padding=padding)
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(normalised)


def test_difficulty_is_the_margin_that_the_reference_lacks():
    sides = {"chosen": CHOSEN[1], "rejected": REJECTED[1]}
    log_probs = {side: numbers([sum(row) for row in rows]) for side, rows in sides.items()}
    counts = {side: torch.tensor([len(row) for row in rows]) for side, rows in sides.items()}
    found = numbers_of({side: torch.zeros(3, 1) for side in sides}, log_probs, counts)
    assert found["difficulty_of_sums"].tolist() == pytest.approx([-0.5, -0.95, 4.15])
    assert found["difficulty"].tolist() == pytest.approx([0.133333333333, -0.15, 0.775])
    assert found["difficulty"].argsort().tolist() == [1, 0, 2]  # from easy to hard


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_llava(Path(mkdtemp()))


@pytest.mark.parametrize("prefix", ["shared", "repeated"])
def test_states_are_those_of_transformers_and_padding_changes_nothing(folder, prefix):
    model = VLM(path=str(folder), lora=None, prefix=prefix).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none", trainable=False
    )
    batch = response_batch(model.processor, "chosen", "rejected", "chosen@diffuse")
    found = pair_numbers(model, batch)
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    sums, totals, counts = {}, {}, {}
    for side, rows in batch.responses.items():
        with torch.no_grad():
            output = network(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                output_hidden_states=True,
                **batch.image_inputs[None],
            )
        before = rows.response_mask[:, 1:, None]  # positions that predict a token of the response
        sums[side] = (output.hidden_states[-1][:, :-1] * before).sum(dim=1).double()
        own = output.logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])
        totals[side] = (own * before).sum(dim=(1, 2)).double()
        counts[side] = before.sum(dim=(1, 2))
    assert len(set(counts["chosen"].tolist())) > 1  # so that some rows are padded
    for name, expected in numbers_of(sums, totals, counts).items():
        assert close(found[name], expected), name
    single = [response_batch(model.processor, order=[row]) for row in range(3)]
    for row, alone in enumerate(single):
        for name, value in pair_numbers(model, alone).items():
            assert close(value, found[name][row : row + 1]), name


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)
