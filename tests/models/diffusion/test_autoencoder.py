from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from diffalign.models.diffusion.autoencoder import Autoencoder


@pytest.fixture
def network(tiny_sd15):
    return AutoencoderKL.from_pretrained(tiny_sd15 / "vae").requires_grad_(False).eval()


@pytest.fixture
def images():
    return torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def latents():
    return torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))


def test_latents_are_a_scaled_sample_of_the_posterior(network, images):
    posterior = network.encode(images).latent_dist
    noise = torch.stack(
        [torch.randn((4, 4, 4), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]
    )

    latents = Autoencoder(network, images_at_once=2).encode(images, [1, 2, 3])

    torch.testing.assert_close(latents, 0.5 * (posterior.mean + posterior.std * noise))


def test_images_are_decoded_from_unscaled_latents(network, latents):
    expected = network.decode(latents / 0.5).sample

    images = Autoencoder(network, images_at_once=2).decode(latents, clamp=False)

    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(images, expected)
    assert images.abs().max() > 0


def test_a_shift_is_taken_off_and_put_back(network, images, latents):
    plain = Autoencoder(network, images_at_once=4)
    without = plain.encode(images, [1, 2, 3]), plain.decode(latents, clamp=False)
    network.register_to_config(shift_factor=0.2)
    shifted = Autoencoder(network, images_at_once=4)

    torch.testing.assert_close(shifted.encode(images, [1, 2, 3]), without[0] - 0.2 * 0.5)
    torch.testing.assert_close(shifted.decode(latents - 0.2 * 0.5, clamp=False), without[1])


@pytest.mark.parametrize("images_at_once", [1, 2, 4])
def test_no_more_images_than_allowed_pass_at_once(network, images, latents, images_at_once):
    sizes = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    autoencoder = Autoencoder(network, images_at_once=images_at_once)

    autoencoder.encode(images, [1, 2, 3])
    autoencoder.decode(latents, clamp=False)

    assert max(sizes) <= images_at_once
    assert sum(sizes) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_own_precision_is_neither_autocast_nor_seen_outside(network, images, latents, dtype):
    autoencoder = Autoencoder(network.to(dtype), images_at_once=2)
    encoded, decoded = (
        autoencoder.encode(images, [1, 2, 3]),
        autoencoder.decode(latents, clamp=False),
    )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(autoencoder.encode(images, [1, 2, 3]), encoded)
        assert torch.equal(autoencoder.decode(latents, clamp=False), decoded)

    assert encoded.dtype == decoded.dtype == torch.float32
    assert not encoded.requires_grad
    assert not decoded.requires_grad


def test_a_latent_is_for_eight_pixels(network):
    assert Autoencoder(network, images_at_once=1).factor == 8


def test_per_channel_statistics_are_taken_off_and_put_back(network, images, latents):
    plain = Autoencoder(network, images_at_once=4)
    without = plain.encode(images, [1, 2, 3]), plain.decode(latents, clamp=False)
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 1.5]
    network.register_to_config(latents_mean=mean, latents_std=std)
    told = Autoencoder(network, images_at_once=4)
    offset, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))

    encoded = (without[0] - offset * 0.5) / spread
    torch.testing.assert_close(told.encode(images, [1, 2, 3]), encoded)
    torch.testing.assert_close(
        told.decode((latents - offset * 0.5) / spread, clamp=False), without[1]
    )


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_values_that_are_not_finite_are_blamed_on_the_autoencoder(network, images, latents, way):
    autoencoder = Autoencoder(network, images_at_once=2)
    encode, decode = (
        lambda: autoencoder.encode(images, [1, 2, 3]),
        lambda: autoencoder.decode(latents, clamp=False),
    )
    for run in (encode, decode):
        run()
    assert autoencoder.blame() is None
    latents[0] = torch.nan  # which is the denoiser's
    decode()
    assert autoencoder.blame() is None

    part = network.encoder if way == "encode" else network.decoder
    part.conv_out.weight.data.fill_(torch.inf)
    {"encode": encode, "decode": decode}[way]()

    assert "the autoencoder, in float32, made values that are not finite" in autoencoder.blame()


def test_in_half_precision_the_way_out_is_named(network, images):
    autoencoder = Autoencoder(network.half(), images_at_once=2)
    network.encoder.conv_out.weight.data.fill_(60_000.0)

    autoencoder.encode(images, [1, 2, 3])

    assert "Set model.vae_dtype to float32, or model.vae to" in autoencoder.blame()
