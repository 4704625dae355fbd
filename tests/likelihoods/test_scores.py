from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from diffalign.likelihoods.scores import Scores, preference_from_scores
from diffalign.models.diffusion.reverse import through_one_step
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.preference.step_aware import StepAwarePreference
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.step_aware import StepAware
from diffalign.timesteps import TimestepSampling
from tests.tiny_clip import write_clip

CPU = torch.device("cpu")
VIEWS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Redness(AbstractScorer):
    """Ten times the mean of the red channel."""

    fingerprint = "redness"

    def score(self, images, prompts, t=None):
        assert t is None and len(images) == len(prompts)
        return 10 * images[:, 0].mean(dim=(1, 2))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_sd15):
    clip = write_clip(tmp_path_factory.mktemp("clip"))
    return StepAwarePreference(path=str(clip), base=SD15(path=str(tiny_sd15)), guidance=3.0)


@pytest.fixture(scope="module")
def model(settings):
    loaded = settings.load(device=CPU, compute_dtype=torch.float32, reference="none")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.trained_parameters():
        if "adaLN" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return loaded


def rows(model, batch, likelihood=None):
    likelihood = likelihood or Scores()
    with torch.no_grad():
        return likelihood.evaluate(model, likelihood.prepare(model, batch))


def weights(model, batch, likelihood=None):
    likelihood = likelihood or Scores()
    row_metadata = likelihood.row_metadata(likelihood.prepare(model, batch))
    return {view: fact["weight"].tolist() for view, fact in row_metadata.items()}


def test_scores_are_those_of_the_exported_scorer(model, make_pairs, tmp_path):
    batch = make_pairs("a", "b")
    scores = rows(model, batch)
    model.export(tmp_path / "final")
    scorer = StepAware(path=str(tmp_path / "final"))
    for view in VIEWS:
        halfway = through_one_step(
            model.base,
            batch.images[view],
            batch.captions,
            batch.timesteps,
            noise_seeds=batch.noise_seeds,
            encoding_seeds=batch.encoding_seeds[view],
            guidance=3.0,
        )
        expected = scorer.score(halfway, batch.captions, batch.timesteps.long())
        torch.testing.assert_close(scores[view], expected, atol=1e-4, rtol=0)


def test_equal_sides_with_equal_seeds_score_equally(model, make_pairs):
    batch = make_pairs("a", "b")
    same = dataclasses.replace(
        batch,
        images=dict.fromkeys(VIEWS, batch.images["chosen"]),
        encoding_seeds=dict.fromkeys(VIEWS, batch.encoding_seeds["chosen"]),
    )
    scores = rows(model, same)
    torch.testing.assert_close(scores["chosen"], scores["rejected"], atol=1e-4, rtol=0)


def test_a_dropped_caption_is_scored_all_the_same(model, make_pairs):
    batch = make_pairs("a", "b")
    dropped = dataclasses.replace(batch, prompts=("", ""))
    for view in VIEWS:
        assert torch.equal(rows(model, batch)[view], rows(model, dropped)[view])


def test_the_gradient_reaches_the_preference_model_alone(model, make_pairs):
    likelihood = Scores()
    scores = likelihood.evaluate(model, likelihood.prepare(model, make_pairs("a", "b")))
    (scores["chosen"] - scores["rejected"]).sum().backward()
    assert all(p.grad is not None for _, p in model.trained_parameters())
    assert all(p.grad is None for p in model.base.network.parameters())
    model.network.zero_grad()


class TestWeights:
    def test_a_decided_pair_weighs_on_its_chosen_side(self, model, make_pairs):
        assert weights(model, make_pairs("a", "b")) == {"chosen": [1, 1], "rejected": [0, 0]}

    def test_a_tie_weighs_half_on_either_side_and_importance_multiplies(self, model, make_pairs):
        batch = dataclasses.replace(
            make_pairs("a", "b"),
            strength={
                "preference": torch.tensor([1.0, 0.5]),
                "weight": torch.tensor([0.25, 0.5]),
            },
        )
        assert weights(model, batch) == {"chosen": [0.25, 0.25], "rejected": [0.0, 0.25]}

    def test_a_scorer_of_the_clean_images_replaces_the_labels(self, model, make_pairs):
        batch = make_pairs("a", "b", "c")
        images = {view: batch.images[view].clone() for view in VIEWS}
        for row, (chosen, rejected) in enumerate([(0.9, 0.1), (0.1, 0.9), (0.5, 0.501)]):
            images["chosen"][row, 0], images["rejected"][row, 0] = chosen, rejected
        batch = dataclasses.replace(
            batch, images=images, strength={"preference": torch.tensor([0.5] * 3)}
        )
        scored = weights(model, batch, Scores(relabel=Redness()))
        assert scored == {"chosen": [1, 0, 0.5], "rejected": [0, 1, 0.5]}


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0.0, 0.5), (0.2006, 0.5), (-0.2006, 0.5), (0.2008, 1.0), (-0.2008, 0.0), (90.0, 1.0)],
)
def test_the_published_gap_of_a_tie(gap, expected):
    # |sigmoid(m) - sigmoid(-m)| <= 0.1 up to m = 2 atanh(0.1)
    assert 2 * math.atanh(0.1) == pytest.approx(0.2007, abs=1e-4)
    label = preference_from_scores(torch.tensor([20 + gap]), torch.tensor([20.0]), tie_below=0.1)
    assert label.item() == expected


@pytest.mark.parametrize("scores", [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, torch.inf)])
def test_a_scorer_without_an_response_gives_no_label(scores):
    label = preference_from_scores(*map(torch.tensor, scores), tie_below=0.1)
    assert label.isnan()


class TestChecks:
    def test_a_preference_model_passes(self, settings):
        Scores().check(settings)

    def test_a_diffusion_model_is_refused(self, settings):
        with pytest.raises(ValueError, match=r"set model\.kind to step_aware"):
            Scores().check(settings.base)

    def test_times_that_the_base_does_not_have_are_refused(self, settings):
        with pytest.raises(ValueError, match="timesteps reach 1999"):
            Scores(timesteps=TimestepSampling(high=2000)).check(settings)

    def test_a_scorer_of_noisy_images_cannot_relabel(self):
        with pytest.raises(ValueError, match="relabel scores clean images"):
            Scores(relabel=StepAware(path="anywhere"))

    def test_tie_below_is_a_difference_of_probabilities(self):
        with pytest.raises(ValueError, match="tie_below must be at least 0 and below 1, got 1"):
            Scores(tie_below=1.0)
