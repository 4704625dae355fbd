"""A reward model whose head compares is a judge of pairs, and so is one whose head scores."""

from __future__ import annotations

import pytest
import torch

from diffalign.errors import ModelError
from diffalign.models.preference.clip_reward import CLIPReward
from diffalign.models.preference.heads.general import General
from diffalign.models.preference.heads.linear import Linear
from diffalign.pair_judges.trained import TrainedPairJudge
from diffalign.scorers.trained import Trained
from tests.models.preference.test_rewards import PROMPTS, clip, disturb, images, loaded  # noqa: F401


@pytest.fixture
def some(images):  # noqa: F811
    return list(images)


def test_a_general_head_says_its_preference(clip, some, tmp_path):  # noqa: F811
    model = loaded(CLIPReward(path=clip, head=General(hidden=8)))
    disturb(model)
    model.network.eval()
    model.export(tmp_path / "general")
    judge = TrainedPairJudge(path=str(tmp_path / "general"), images_per_batch=2)
    others = some[1:] + some[:1]
    prompts = list(PROMPTS)
    found = judge.prefers(some, others, prompts)
    with torch.no_grad():
        one, other = (model.outputs(model.read(each, prompts), None) for each in (some, others))
        a, b = model.head.sides(one, other)
    assert found.tolist() == pytest.approx(torch.sigmoid(a - b).tolist(), abs=1e-5)
    assert found.max() - found.min() > 1e-3
    assert judge.prefers(others, some, prompts).tolist() == pytest.approx((1 - found).tolist())
    with pytest.raises(ModelError, match=r"scorer\.kind=pairwise scorer\.judge\.kind=trained"):
        Trained(path=str(tmp_path / "general")).score_images(some, prompts)


def test_a_head_that_scores_prefers_by_the_difference(clip, some, tmp_path):  # noqa: F811
    model = loaded(CLIPReward(path=clip, head=Linear()))
    disturb(model)
    model.export(tmp_path / "linear")
    others, prompts = some[1:] + some[:1], list(PROMPTS)
    path = str(tmp_path / "linear")
    with torch.no_grad():
        scorer = Trained(path=path)
        gap = scorer.score_images(some, prompts) - scorer.score_images(others, prompts)
    found = TrainedPairJudge(path=path).prefers(some, others, prompts).tolist()
    assert found == pytest.approx(torch.sigmoid(gap).tolist(), abs=1e-5)
    assert max(found) - min(found) > 1e-3
    with pytest.raises(ModelError, match="knows no users"):
        TrainedPairJudge(path=path, user="ann").prefers(some, others, prompts)
