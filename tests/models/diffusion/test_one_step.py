from __future__ import annotations

import pytest
import torch

from diffalign.models.diffusion.one_step import through_one_step
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.seeding import noise_from_seeds

CPU = torch.device("cpu")


@pytest.fixture(params=["sd15", "sd15_v", "sdxl", "sdxl_v"])
def model(request):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    settings = (SDXL if "sdxl" in request.param else SD15)(path=str(folder))
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="none")


def look(model, batch, *, view="chosen", guidance=5.0, **changes):
    given = {
        "images": batch.images[view],
        "prompts": batch.captions,
        "t": batch.timesteps,
        "noise_seeds": batch.noise_seeds,
        "encoding_seeds": batch.encoding_seeds[view],
        **changes,
    }
    return through_one_step(model, guidance=guidance, **given)


def test_it_is_the_decoded_prediction_of_the_noised_latent(model, make_pairs):
    batch = make_pairs("a", "b")
    seen = look(model, batch, guidance=3.0)
    with torch.no_grad():
        clean = model.autoencoder.encode(batch.images["chosen"], batch.encoding_seeds["chosen"])
        t, noising = batch.timesteps, model.noising
        noise = noise_from_seeds(batch.noise_seeds, tuple(clean.shape[1:]))
        noisy = noising.corrupt(clean, noise, t)
        network = model.network.eval()
        conditioning = model.prompts.guided(batch.captions, guidance=3.0, size=(32, 32))
        doubled = torch.cat([noisy, noisy])
        both = network(doubled, noising.network_time(t).repeat(2), **conditioning).sample
        without, given = both.chunk(2)
        prediction = without + 3.0 * (given - without)
        expected = model.autoencoder.decode(noising.denoised(noisy, prediction, t))
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    assert seen.shape == batch.images["chosen"].shape


def test_a_row_does_not_depend_on_its_company(model, make_pairs):
    together, alone = look(model, make_pairs("a", "b")), look(model, make_pairs("b"))
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


def test_equal_images_with_equal_seeds_look_equal(model, make_pairs):
    batch = make_pairs("a")
    image = batch.images["chosen"].repeat(2, 1, 1, 1)
    twice = look(
        model,
        batch,
        images=image,
        prompts=batch.captions * 2,
        t=batch.timesteps.repeat(2),
        noise_seeds=batch.noise_seeds * 2,
        encoding_seeds=batch.encoding_seeds["chosen"] * 2,
    )
    torch.testing.assert_close(twice[0], twice[1], atol=1e-6, rtol=0)


def test_it_leaves_the_model_in_its_mode_and_without_gradients(model, make_pairs):
    model.network.train()
    seen = look(model, make_pairs("a"))
    assert model.network.training
    assert not seen.requires_grad
