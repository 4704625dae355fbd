"""Rows that go on from copied keys and values, next to rows of their own.

Log-probabilities are the published ones of `test_branches`: of the tiny Llama a float64 computation
in numpy, of the tiny Qwen2-VL transformers with a row for every response.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlavaConfig, MistralConfig

from diffalign.models.vlm.branches import Branches
from diffalign.models.vlm.prefix_cache import ContinuedRows, PrefixCache, cache_obstacle
from tests.models.vlm.test_branches import CHOSEN, PUBLISHED, REJECTED


def prefixes_of(model: Any, rows: list[list[int]], images: dict[str, Tensor]) -> PrefixCache:
    ids = torch.tensor(rows)
    further = {"mm_token_type_ids": (ids == 29).long(), **images} if images else {}
    none = torch.zeros_like(ids)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **further}
    positions = Branches.of(model.model, segments=none, shifts=none, inputs=given).positions
    return PrefixCache(model.model, ids, positions, further)


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def sums(model: Any, prompt: list[int], images: dict[str, Tensor], piece: int) -> list[float]:
    """Log-probabilities of both responses, the last tokens of which are fed `piece` at a time."""
    prefixes = prefixes_of(model, [prompt], images)
    rows = ContinuedRows(prefixes, [0, 0])
    ids, mask = left_padded([CHOSEN, REJECTED])
    hidden = [prefixes.hidden[:, -1:].expand(2, -1, -1)]
    first = ids.shape[1] - 2 * piece
    for begin, end in ((0, first), (first, first + piece), (first + piece, ids.shape[1])):
        hidden.append(rows.feed(ids[:, begin:end], mask[:, begin:end]))
    log_probs = model.lm_head(torch.cat(hidden, dim=1)).log_softmax(-1)
    found = []
    for row, response in enumerate((CHOSEN, REJECTED)):
        start = ids.shape[1] - len(response)
        before = [0, *range(start + 1, ids.shape[1])]
        found.append(float(log_probs[row, before, torch.tensor(response)].sum()))
    return found


@pytest.mark.parametrize("piece", [1, 2])
@pytest.mark.parametrize("family", PUBLISHED)
def test_both_responses_have_the_values_of_rows_of_their_own(family, piece):
    build, prompt, images, expected = PUBLISHED[family]
    with torch.no_grad():
        assert sums(build(), prompt, images, piece) == pytest.approx(expected, abs=2e-6)


def test_positions_after_an_image_go_on_from_its_largest():
    build, prompt, images, expected = PUBLISHED["qwen2_vl"]
    model = build()
    with torch.no_grad():
        prefixes = prefixes_of(model, [prompt], images)
    assert prefixes.following.tolist() == [9]  # of 12 tokens
    wrong = PrefixCache.__init__

    def counted(self: PrefixCache, *arguments: Any) -> None:
        wrong(self, *arguments)
        self.following = torch.tensor([self.length])

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "__init__", counted)
        found = sums(model, prompt, images, 1)
    assert abs(found[0] - expected[0]) > 0.1 and abs(found[1] - expected[1]) > 0.1


def test_rows_of_several_prefixes_grow_and_are_left_out():
    build, prompt, images, _ = PUBLISHED["llama"]
    model, other = build(), [5, *PUBLISHED["llama"][1][1:]]
    tail = [(7 * n) % 31 + 1 for n in range(150)]  # more than there is room for at first
    with torch.no_grad():
        rows = ContinuedRows(prefixes_of(model, [prompt, other], images), [1, 0, 1])
        rows.feed(*left_padded([[3, 4], [6], [9, 8]]))
        rows.keep(torch.tensor([1, 2]))
        fed = rows.feed(*left_padded([tail, tail[:149]]))[:, -1]
        for row, whole in enumerate(([*prompt, 6, *tail], [*other, 9, 8, *tail[:149]])):
            alone = model.model(torch.tensor([whole])).last_hidden_state[0, -1]
            torch.testing.assert_close(fed[row], alone, atol=1e-6, rtol=1e-6)


def model_of(config: Any, **generation: Any) -> Any:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    cls: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    stand_in = type(cls.__name__, (), {"forward": cls.forward})()
    stand_in.config = config
    stand_in.generation_config = SimpleNamespace(**generation)
    return stand_in


OBSTACLES: dict[str, tuple[Any, str]] = {
    "a window": (lambda: LlavaConfig(text_config=MistralConfig(sliding_window=64)), "64 tokens"),
    "layers with windows": (transformers.Gemma3Config, "of the kind sliding_attention"),
    "a prefix that is seen as a whole": (transformers.PaliGemmaConfig, "those after them"),
    "masks of images": (transformers.MllamaConfig, "a mask of their own"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_families_that_cannot_go_on_from_a_copy_are_told(what):
    config, message = OBSTACLES[what]
    assert message in (cache_obstacle(model_of(config())) or "none")


def test_recurrent_layers_and_settings_of_a_checkpoint_are_told():
    config: Any = LlavaConfig()
    assert cache_obstacle(model_of(config)) is None
    assert cache_obstacle(model_of(config, repetition_penalty=1.05, num_beams=1)) is None
    found = cache_obstacle(model_of(config, no_repeat_ngram_size=3))
    assert found == "the checkpoint's generation_config sets no_repeat_ngram_size"
    config.text_config.layer_types = ["full_attention", "linear_attention"]
    assert "of the kind linear_attention" in (cache_obstacle(model_of(config)) or "none")
