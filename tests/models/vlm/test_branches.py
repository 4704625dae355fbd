"""Responses as branches of one row: next to rows of their own, and what families allow it.

Log-probabilities of the tiny Llama are of a float64 computation in numpy, those of the tiny
Qwen2-VL of transformers with a row for every response.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MistralConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from diffalign.models.lora import LoraSettings
from diffalign.models.vlm import branches
from diffalign.models.vlm.branches import PADDING, Branches, Layout, branch_mask, prefix_obstacle
from diffalign.models.vlm.families import find_modules
from diffalign.models.vlm.quirks.plain import Plain
from diffalign.models.vlm.token_scores import ResponseRows, TokenScorer
from diffalign.models.vlm.vision_pass import ImageInputs

CHOSEN, REJECTED = [11, 5, 17, 2], [8, 30, 6, 14, 22, 2]
TEXT_PROMPT = [1, 7, 12, 3, 9, 20, 4]
IMAGE_PROMPT = [1, 7, 27, *[29] * 6, 26, 9, 4]
IMAGE = {
    "pixel_values": torch.sin(0.1 * torch.arange(24 * 24, dtype=torch.float64)).view(24, 24),
    "image_grid_thw": torch.tensor([[1, 4, 6]]),
}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}


def with_known_weights(model: Any) -> Any:
    """Parameter number k in the order of names holds .3 sin(1.3 i + .01 i^2 + k) at element i."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.3 * torch.sin(1.3 * i + 0.01 * i**2 + number)
        if parameter.dim() == 1:
            values = torch.full_like(values, 0.0 if name.endswith("bias") else 1.0)
        parameter.data = values.view(parameter.shape)
    return model.double().eval()


def llama() -> Any:
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
    return with_known_weights(LlamaForCausalLM(config))


def qwen2_vl() -> Any:
    tower = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
    }
    text = {
        **SIZES,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config = Qwen2VLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=29,
        video_token_id=28,
        vision_start_token_id=27,
        vision_end_token_id=26,
        tie_word_embeddings=False,
    )
    return with_known_weights(Qwen2VLForConditionalGeneration(config))


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def sums(model: Any, prompt: list[int], images: dict[str, Tensor], *, branched: bool) -> Tensor:
    """Log-probability of both responses to a prompt, [2]."""
    responses = [CHOSEN, REJECTED]
    rows = [padded([prompt + response]) for response in responses]
    laid_out = [Layout.of(*([part] for part in row)) for row in rows]
    if branched:
        laid_out = [Layout.of([ids for ids, _ in rows], [mask for _, mask in rows])]
    found = []
    for number, layout in enumerate(laid_out):
        some = list(range(2)) if branched else [number]
        ids = layout.row([rows[n][0] for n in some])
        inputs = {"input_ids": ids, "attention_mask": (layout.segments != PADDING).long()}
        if images:
            inputs = {**inputs, "mm_token_type_ids": (ids == 29).long(), **images}
        arguments: dict[str, Tensor] = {"attention_mask": inputs["attention_mask"]}
        if branched:
            arguments = Branches.of(
                model.model, segments=layout.segments, shifts=layout.shifts, inputs=inputs
            ).arguments()
        logits = model(**{**inputs, **arguments}, use_cache=False).logits[0]
        for branch, n in enumerate(some):
            own = torch.arange(len(prompt), len(prompt) + len(responses[n]))
            _, before = layout.before(branch, torch.zeros_like(own), own)
            log_probs = logits[before].log_softmax(-1)
            found.append(log_probs.gather(1, torch.tensor(responses[n])[:, None]).sum())
    return torch.stack(found)


PUBLISHED = {
    "llama": (llama, TEXT_PROMPT, {}, (-16.715428146217, -22.885331853709)),
    "qwen2_vl": (qwen2_vl, IMAGE_PROMPT, IMAGE, (-15.001915345924, -24.031576630889)),
}


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("family", PUBLISHED)
def test_both_responses_have_the_values_of_rows_of_their_own(family, branched):
    build, prompt, images, expected = PUBLISHED[family]
    with torch.no_grad():
        found = sums(build(), prompt, images, branched=branched)
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


WRONG = {
    "a plain causal mask": ("llama", "mask", -24.353678563481),
    "positions that count on": ("llama", "positions", -24.260191885497),
    "positions that count on after an image": ("qwen2_vl", "positions", None),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_mask_or_position_changes_the_rejected_response_alone(mistake, monkeypatch):
    family, what, value = WRONG[mistake]
    build, prompt, images, expected = PUBLISHED[family]
    if what == "mask":
        monkeypatch.setattr(
            branches, "branch_mask", lambda s, *_, **__: branch_mask(torch.zeros_like(s))
        )
    else:
        plain = Branches.of
        monkeypatch.setattr(
            Branches,
            "of",
            lambda model, **k: plain(model, **{**k, "shifts": torch.zeros_like(k["shifts"])}),
        )
    with torch.no_grad():
        chosen, rejected = sums(build(), prompt, images, branched=True).tolist()
    assert chosen == pytest.approx(expected[0], abs=2e-6)
    assert abs(rejected - expected[1]) > 0.1
    if value is not None:
        assert rejected == pytest.approx(value, abs=2e-6)


def test_the_gradient_is_that_of_rows_of_their_own():
    norms = []
    for branched in (False, True):
        model = llama()
        chosen, rejected = sums(model, TEXT_PROMPT, {}, branched=branched)
        (chosen - rejected).backward()
        layer = model.model.layers[0].self_attn.q_proj.weight.grad
        norms.append([model.model.embed_tokens.weight.grad.norm().item(), layer.norm().item()])
        assert norms[-1] == pytest.approx([15.287259, 10.496053], abs=1e-5)
    assert norms[0] == pytest.approx(norms[1], abs=2e-6)


def test_what_responses_have_in_common_is_held_once_and_padding_sees_and_shows_nothing():
    chosen, rejected = padded([[1, 5, 6, 7], [1, 5]]), padded([[1, 5, 6, 8, 9], [2, 4, 3]])
    layout = Layout.of([chosen[0], rejected[0]], [chosen[1], rejected[1]])
    assert layout.prefixes.tolist() == [3, 0]
    assert layout.row([chosen[0], rejected[0]], padding=-7).tolist() == [
        [1, 5, 6, 7, 8, 9],
        [1, 5, 2, 4, 3, -7],
    ]
    assert layout.segments.tolist() == [[0, 0, 0, 1, 2, 2], [1, 1, 2, 2, 2, PADDING]]
    assert (torch.arange(6) - layout.shifts)[0].tolist() == [0, 1, 2, 3, 3, 4]
    assert (torch.arange(6) - layout.shifts)[1, :5].tolist() == [0, 1, 0, 1, 2]
    columns = torch.tensor([3, 4])
    assert layout.before(1, torch.zeros(2, dtype=torch.int64), columns)[1].tolist() == [2, 4]

    mask = branch_mask(layout.segments)[:, 0]
    assert mask[0, 3].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert mask[0, 5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5]
    assert mask[1, 4].nonzero().flatten().tolist() == [2, 3, 4]
    assert mask[1, 5].any() and not mask[:, :5, 5][1].any()


def test_a_response_that_is_the_beginning_of_the_other_is_no_branch():
    short, long = padded([[1, 5, 2]]), padded([[1, 5, 2, 3]])
    layout = Layout.of([short[0], long[0]], [short[1], long[1]])
    assert layout.segments.tolist() == [[0, 0, 0, 2]]
    assert layout.row([short[0], long[0]]).tolist() == [[1, 5, 2, 3]]
    row = torch.zeros(1, dtype=torch.int64)
    assert layout.before(0, row, torch.tensor([2]))[1].tolist() == [1]


def test_one_row_a_sample_stays_as_it_is():
    ids, mask = padded([[1, 5, 6], [1]])
    layout = Layout.of([ids], [mask])
    assert torch.equal(layout.row([ids]), ids)
    assert torch.equal((layout.segments != PADDING).long(), mask)
    assert not layout.shifts.any()


def of(name: str, **settings: Any) -> str | None:
    config = getattr(transformers, f"{name}Config")
    return prefix_obstacle(config(**settings), asked="auto", lora=None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Llava", None),
        ("LlavaNext", None),
        ("LlavaOnevision", None),
        ("InternVL", None),
        ("Idefics3", None),
        ("Qwen2VL", None),
        ("Qwen2_5_VL", None),
        ("Qwen3VL", None),
        ("Qwen3_5", "layers of the kind linear_attention"),
        ("Llama4", None),
        ("Gemma3", None),
        ("PaliGemma", None),
        ("Mllama", "look at images by a mask of their own"),
        ("Gemma3n", "gemma3n_text is not known to take a mask for each"),
    ],
)
def test_a_configuration_tells_whether_responses_can_be_branches(name, reason):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("a family that this version of transformers does not have")
    found = of(name)
    assert found is None if reason is None else found is not None and reason in found


def test_tokens_that_see_ahead_are_in_the_way_where_it_is_not_known_which(monkeypatch):
    monkeypatch.setattr(branches, "family_of", Plain)
    assert "see those after them" in str(of("PaliGemma"))


@pytest.mark.parametrize(("window", "kept"), [(None, 6), (3, 3)])
def test_a_window_is_in_the_mask_of_the_layers_that_have_it(window, kept):
    def masks(config: Any, implementation: str) -> Any:
        config.get_text_config()._attn_implementation = implementation
        row = torch.zeros((1, 6), dtype=torch.int64)
        model = SimpleNamespace(config=config)
        return Branches.of(model, segments=row, shifts=row, inputs={"input_ids": row}).masks()

    mistral = LlavaConfig(text_config=MistralConfig(sliding_window=window))
    seen = masks(mistral, "sdpa")
    assert seen[0, 0].sum(1).tolist() == [min(n + 1, kept) for n in range(6)]
    added = masks(mistral, "eager")
    assert added.dtype == torch.float32 and torch.equal(added == 0, seen)
    assert added.min() == torch.finfo(torch.float32).min

    text = {"use_sliding_window": window is not None, "sliding_window": 3, "max_window_layers": 1}
    found = masks(Qwen2VLConfig(text_config={**text, "num_hidden_layers": 2}), "sdpa")
    if window is None:
        assert found.sum() == 21
    else:
        assert {kind: int(mask.sum()) for kind, mask in found.items()} == {
            "full_attention": 21,
            "sliding_attention": 15,
        }


def test_blocks_and_chunks_are_counted_as_transformers_does():
    row = torch.zeros((1, 6), dtype=torch.int64)
    columns, blocks = torch.arange(6)[None], torch.tensor([[-1, 0, 0, 0, -1, 1]])
    chunked = branch_mask(row, columns, chunk=4)[0, 0]
    assert chunked.sum(1).tolist() == [1, 2, 3, 4, 1, 2]
    within = branch_mask(row, columns, window=2, blocks=blocks)[0, 0]
    assert within.int().tolist()[1] == [1, 1, 1, 1, 0, 0]
    assert within.int().tolist()[3] == [0, 0, 1, 1, 0, 0]
    around = branch_mask(row, columns, window=2, blocks=blocks, blocks_within=False)[0, 0]
    assert around.int().tolist()[3] == [0, 1, 1, 1, 0, 0]


def test_settings_may_ask_for_a_row_each():
    config = LlavaConfig()
    assert prefix_obstacle(config, asked="repeated", lora=None) == "model.prefix is repeated"
    dropped = prefix_obstacle(config, asked="shared", lora=LoraSettings(dropout=0.1))
    assert dropped is not None and "dropout" in dropped
    assert prefix_obstacle(config, asked="shared", lora=LoraSettings()) is None


def test_rows_of_the_scorer_end_where_the_model_says():
    """The wanted tokens of both branches, through `TokenScorer`, images included."""
    model = qwen2_vl()
    ids = [padded([IMAGE_PROMPT + response]) for response in (CHOSEN, REJECTED)]
    layout = Layout.of([i for i, _ in ids], [m for _, m in ids])
    row = layout.row([i for i, _ in ids])
    further = {"mm_token_type_ids": (row == 29).long()}
    mask = torch.ones_like(row)
    before = [
        layout.before(
            n, torch.zeros(len(r), dtype=torch.int64), len(IMAGE_PROMPT) + torch.arange(len(r))
        )
        for n, r in enumerate((CHOSEN, REJECTED))
    ]
    rows = ResponseRows(
        input_ids=row,
        attention_mask=mask,
        further=further,
        image_inputs=ImageInputs(inputs=IMAGE),
        before=torch.cat([columns for _, columns in before]),
        targets=torch.tensor([CHOSEN + REJECTED]).T,
        branches=Branches.of(
            model.model,
            segments=layout.segments,
            shifts=layout.shifts,
            inputs={"input_ids": row, "attention_mask": mask, **further, **IMAGE},
        ),
    )
    scorer = TokenScorer(model, find_modules(model, where="here"), positions_at_once=4)
    with torch.no_grad():
        log_probs = scorer([rows])[0].log_probs[:, 0]
    found = [part.sum().item() for part in log_probs.split([len(CHOSEN), len(REJECTED)])]
    assert found == pytest.approx(PUBLISHED["qwen2_vl"][3], abs=2e-6)
