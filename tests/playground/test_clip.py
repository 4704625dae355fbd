"""The playground's CLIP: an ordinary one, small, and a scorer of clean images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import read_clip, read_tokenizer
from diffalign.playground import models
from diffalign.playground.models import build_clip, playground_clip_path, save_clip
from diffalign.playground.scenes import KINDS, Kind, describe, place, render
from diffalign.scorers.pickscore import PickScore


def sampled(rows: list[tuple[Kind, ...]]) -> torch.Tensor:
    """One clean image of each row of objects."""
    rng = np.random.default_rng(0)
    arrays = [np.array(render(place(kinds, rng))) for kinds in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, second, other = (build_clip(seed).visual_projection.weight for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_clip_is_half_as_large_and_opens_again(tmp_path):
    clip = build_clip(0)
    save_clip(clip, tmp_path)
    assert clip.visual_projection.weight.dtype == torch.float32
    assert (tmp_path / "model.safetensors").stat().st_size < 1.3e6
    opened = read_clip(str(tmp_path)).state_dict()
    torch.testing.assert_close(opened, clip.state_dict(), atol=1e-3, rtol=1e-3)
    tokenizer = read_tokenizer(str(tmp_path))
    text = "a red circle and a blue square"
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == text.split()


def test_a_missing_clip_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_assets", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"scripts/pretrain_playground_clip\.py --out"):
        playground_clip_path()


def test_the_shipped_clip_is_small_and_holds_no_pickle():
    files = [path for path in playground_clip_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    clip = CLIPModel.from_pretrained(playground_clip_path())
    assert 0.5e6 < sum(p.numel() for p in clip.parameters()) < 1e6


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda kinds: kinds[::-1], id="swapped"),
        pytest.param(lambda kinds: kinds[:1], id="missing"),
        pytest.param(lambda kinds: (kinds[0], KINDS[0]), id="another"),
    ],
)
def test_the_shipped_clip_prefers_the_right_image_of_a_prompt(mistake):
    asked = [kinds for kinds in itertools.permutations(KINDS, 2) if KINDS[0] not in kinds][::9]
    prompts = [describe(kinds) for kinds in asked]
    scorer = PickScore(path=str(playground_clip_path()))
    right = scorer.score(sampled(asked), prompts)
    wrong = scorer.score(sampled([mistake(kinds) for kinds in asked]), prompts)
    assert (right > wrong).float().mean() > 0.9
