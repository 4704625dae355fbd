"""What a denoising likelihood measures besides errors under random noise, on tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.likelihoods.denoising import Denoising
from diffalign.models.diffusion.inversion import Inversion
from diffalign.models.diffusion.noising import Epsilon, StraightPath
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.timesteps import TimestepSampling
from tests.likelihoods.test_denoising import reordered
from tests.objectives.fixtures import KEPT

CPU = torch.device("cpu")
VIEWS = ("chosen", "rejected")
SIDES = frozenset(VIEWS)


@pytest.fixture(params=["sd15", "sdxl_v"])
def model(request):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    settings = (SDXL if "sdxl" in request.param else SD15)(
        path=str(folder), lora=LoraSettings(rank=2, dropout=0.5)
    )
    loaded = settings.load(device=CPU, compute_dtype=torch.float32, reference="adapter_off")
    stir(loaded)
    return loaded


def stir(model):
    """Move the policy away from the reference, into training mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.network.train()


def at_times(batch, *times):
    return dataclasses.replace(batch, timesteps=torch.tensor(times, dtype=torch.float64))


class TestInversion:
    INVERSION = Inversion(steps=5)

    def prepared(self, model, batch, **settings):
        inversion = dataclasses.replace(self.INVERSION, **settings)
        return Denoising(inversion=inversion).prepare(model, batch)

    def test_noise_is_what_the_reference_walks_to(self, model, make_pairs):
        batch = at_times(make_pairs("a"), 401.0)
        found = self.prepared(model, batch)
        clean, conditioning = model.latents(batch), model.conditioning(batch)
        kept, latents = model.noising.alphas_cumprod, clean
        with torch.no_grad(), model.reference():
            for before, time in ((0, 1), (1, 201), (201, 401)):
                at = torch.tensor([time, time])
                prediction = model.predict(latents, at, conditioning)
                image_there, noise = model.noising.separate(latents, prediction, at)
                image = (latents - (1 - kept[before]).sqrt() * noise) / kept[before].sqrt()
                latents = (kept[time].sqrt() * image + (1 - kept[time]).sqrt() * noise).float()
                assert image_there.shape == image.shape
        torch.testing.assert_close(found.noisy, latents, rtol=1e-4, atol=1e-4)

    def test_each_image_has_its_own_noise_which_no_seed_decides(self, model, make_pairs):
        batch = at_times(make_pairs("a"), 601.0)
        found = self.prepared(model, batch)
        again = self.prepared(model, dataclasses.replace(batch, noise_seeds=(99,)))
        assert torch.equal(found.noisy, again.noisy)
        assert not torch.allclose(*found.target.chunk(2))

    def test_new_noise_is_that_of_the_seed_and_shared_by_both_sides(self, model, make_pairs):
        batch = at_times(make_pairs("a"), 601.0)
        found = self.prepared(model, batch, eta=0.5)
        assert torch.equal(found.noisy, self.prepared(model, batch, eta=0.5).noisy)
        other = self.prepared(model, dataclasses.replace(batch, noise_seeds=(99,)), eta=0.5)
        assert not torch.allclose(found.noisy, other.noisy)

    def test_rows_have_their_own_times_whatever_their_company(self, model, make_pairs):
        batch = at_times(make_pairs("a", "b", "c"), 1.0, 801.0, 201.0)
        together = self.prepared(model, batch, refined=True)
        for row in range(3):
            alone = self.prepared(model, reordered(batch, [row]), refined=True)
            torch.testing.assert_close(
                together.noisy[[row, row + 3]], alone.noisy, rtol=1e-4, atol=1e-4
            )

    def test_the_reference_walks_without_dropout_and_so_does_the_policy(self, model, make_pairs):
        batch = at_times(make_pairs("a"), 801.0)
        reference = self.prepared(model, batch)
        policy = self.prepared(model, batch, by="policy")
        assert not torch.allclose(reference.noisy, policy.noisy, atol=1e-3)
        assert torch.equal(policy.noisy, self.prepared(model, batch, by="policy").noisy)
        with torch.no_grad():
            for _, parameter in model.trained_parameters():
                parameter.add_(0.5)
        assert torch.equal(reference.noisy, self.prepared(model, batch).noisy)
        assert not torch.equal(policy.noisy, self.prepared(model, batch, by="policy").noisy)

    def test_the_walk_carries_no_gradient_and_leaves_the_mode(self, model, make_pairs):
        found = self.prepared(model, at_times(make_pairs("a"), 801.0), by="policy")
        assert not found.noisy.requires_grad and not found.target.requires_grad
        assert model.network.training and not model.is_reference

    def test_times_are_those_of_the_steps(self):
        likelihood = Denoising(inversion=self.INVERSION, timesteps=TimestepSampling(strata=5))
        sampling = likelihood.timestep_sampling()
        assert sampling.values == (1, 201, 401, 601, 801) and sampling.strata == 5
        times = {sampling.sample(0, "a", n, schedule_length=1000) for n in range(5)}
        assert times == {1.0, 201.0, 401.0, 601.0, 801.0}
        assert "the reference finds in 5 steps" in likelihood.describe()


class TestMismatched:
    LIKELIHOOD = Denoising(mismatched=True)

    def test_every_image_is_measured_next_to_the_next_prompt(self, model, make_pairs):
        model.network.eval()
        batch = make_pairs("a", "b", "c")
        with torch.no_grad():
            found = self.LIKELIHOOD.evaluate(model, self.LIKELIHOOD.prepare(model, batch))
            rolled = dataclasses.replace(batch, prompts=(*batch.prompts[1:], batch.prompts[0]))
            other = Denoising().evaluate(model, Denoising().prepare(model, rolled))
        assert found["mismatched"].shape == (6,)
        expected = torch.cat([other[view] for view in VIEWS])
        torch.testing.assert_close(found["mismatched"], expected, rtol=0, atol=1e-6)
        assert not torch.allclose(expected, torch.cat([found[view] for view in VIEWS]))

    def test_it_has_no_gradient_and_is_no_view_of_the_data(self, model, make_pairs):
        found = self.LIKELIHOOD.evaluate(
            model, self.LIKELIHOOD.prepare(model, make_pairs("a", "b"))
        )
        assert found["chosen"].requires_grad and not found["mismatched"].requires_grad
        assert self.LIKELIHOOD.data_views(SIDES | {"mismatched"}) == SIDES
        assert self.LIKELIHOOD.least_samples == 2
        with pytest.raises(ValueError, match="does not read that view"):
            self.LIKELIHOOD.data_views(SIDES)
        with pytest.raises(ValueError, match="which are others in every batch"):
            self.LIKELIHOOD.check_known_in_advance(SIDES)


class TestEmbeddings:
    @pytest.mark.parametrize("of", ["prompts", "images"])
    def test_each_sample_is_about_something_with_the_mean_taken_off(self, of, model, make_pairs):
        likelihood, batch = Denoising(embedding=of), make_pairs("a", "b", "c")
        prepared = likelihood.prepare(model, batch)
        found = likelihood.row_metadata(prepared)
        about = found["chosen"]["embedding"]
        assert torch.equal(about, found["rejected"]["embedding"]) and len(about) == 3
        torch.testing.assert_close(
            about.mean(dim=0), torch.zeros(about.shape[1]), atol=1e-5, rtol=0
        )
        if of == "prompts":
            states = model.conditioning(batch)["encoder_hidden_states"][:3].mean(dim=1)
        else:
            states = model.latents(batch)[:3].flatten(start_dim=1)
        torch.testing.assert_close(about, states - states.mean(dim=0))
        assert likelihood.gives_measured == {"embedding"}

    def test_a_sample_alone_keeps_its_own(self, model, make_pairs):
        likelihood = Denoising(embedding="prompts")
        found = likelihood.row_metadata(likelihood.prepare(model, make_pairs("a")))
        assert found["chosen"]["embedding"].any()


class TestWeightsOfTimes:
    T = torch.tensor([1.0, 101.0, 501.0, 951.0], dtype=torch.float64)

    def test_published_weights(self):
        noising = Epsilon(schedule_length=1000, alphas_cumprod=KEPT)
        known = [0.001703972162, 0.107019462919, 0.725000933150, 0.991844995433]
        weights = torch.sigmoid(-noising.log_snr(self.T))
        assert weights.tolist() == pytest.approx(known, abs=1e-10)

    def test_weights_are_those_of_the_schedule_of_the_model(self, model, make_pairs):
        likelihood = Denoising(snr_bias=0.0)
        batch = at_times(make_pairs("a", "b", "c", "d"), *self.T.tolist())
        found = likelihood.row_metadata(likelihood.prepare(model, batch))
        expected = 1 - model.noising.alphas_cumprod[self.T.long()]
        assert found["chosen"]["weight"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert "sigmoid(0 - log SNR)" in likelihood.describe()

    def test_the_weight_of_a_pair_is_multiplied(self, model, make_pairs):
        batch = at_times(make_pairs("a", "b"), 501.0, 501.0)
        batch = dataclasses.replace(batch, strength={"weight": torch.tensor([1.0, 3.0])})
        likelihood = Denoising(snr_bias=0.5)
        weight = likelihood.row_metadata(likelihood.prepare(model, batch))["rejected"]["weight"]
        assert weight[1].item() == pytest.approx(3 * weight[0].item())

    def test_a_straight_path_has_the_ratio_of_its_two_shares(self):
        found = StraightPath(schedule_length=1000).log_snr(torch.tensor([250.0, 500.0]))
        assert found.exp().tolist() == pytest.approx([9.0, 1.0])
