import pytest
import torch

from diffalign.models.preference.clip_loading import cosine, image_features, text_features
from diffalign.models.preference.time_conditioned_clip import TimeConditionedCLIP, sinusoidal_time
from tests.tiny_clip import IMAGE_SIZE, build_clip

WIDTH, PROJECTION, TOKENS = 24, 12, 16
EOS = 137


def inputs(count=5):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    tokens = torch.randint(0, 130, (3, TOKENS), generator=generator)
    tokens[:, 9] = EOS
    return pixels, tokens, torch.arange(count) % 3


def network_with_random_modulation():
    network = TimeConditionedCLIP(build_clip()).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "adaLN" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return network


def test_the_time_embedding_has_the_published_values():
    embedding = sinusoidal_time(torch.tensor([501]))[0]
    expected = [-0.08393, 0.30498, 0.99855, -0.99647, 0.95236, 0.05381]
    assert embedding.shape == (256,)
    assert embedding[[0, 1, 127, 128, 129, 255]].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_time_embedding_tells_neighbours_apart_in_float32():
    both = sinusoidal_time(torch.tensor([501, 502]))
    assert both.dtype == torch.float32
    assert (both[0] - both[1]).abs().max() > 0.5


@pytest.mark.parametrize("t", [0, 1, 501, 999])
def test_at_the_start_it_scores_as_the_plain_clip_at_every_time(t):
    clip = build_clip()
    pixels, tokens, rows = inputs()
    with torch.no_grad():
        features = image_features(clip, pixels), text_features(clip, tokens)[rows]
        plain = clip.logit_scale.exp() * cosine(*features)
        scores = TimeConditionedCLIP(clip)(pixels, torch.full((5,), t), tokens, rows)
    torch.testing.assert_close(scores, plain, atol=1e-6, rtol=0)
    assert plain.std() > 0.1


def test_the_plain_scores_are_those_of_transformers():
    clip = build_clip()
    pixels, tokens, rows = inputs()
    with torch.no_grad():
        table = clip(input_ids=tokens, pixel_values=pixels).logits_per_image
        scores = TimeConditionedCLIP(clip)(pixels, torch.zeros(5), tokens, rows)
    torch.testing.assert_close(scores, table[torch.arange(5), rows], atol=1e-5, rtol=0)


def test_a_modulated_block_is_the_published_formula():
    network = network_with_random_modulation()
    layer, vision = network.model.vision_model.encoder.layers[0], network.model.vision_model
    time = torch.randn(1, WIDTH)
    hidden = torch.randn(1, 5, WIDTH)
    linear = layer.adaLN_modulation[1]
    vectors = torch.nn.functional.silu(time) @ linear.weight.T + linear.bias
    at = {
        name: vectors[0, i * WIDTH : (i + 1) * WIDTH]
        for i, name in enumerate(["shift1", "scale1", "gate1", "shift2", "scale2", "gate2"])
    }
    expected = (
        hidden
        + at["gate1"]
        * layer.self_attn(layer.layer_norm1(hidden) * (1 + at["scale1"]) + at["shift1"])[0]
    )
    expected = expected + at["gate2"] * layer.mlp(
        layer.layer_norm2(expected) * (1 + at["scale2"]) + at["shift2"]
    )

    network.model.t_embedder = torch.nn.Identity()  # the time is given as an embedding
    vision.encoder.layers = torch.nn.ModuleList([layer])
    vision.embeddings = vision.pre_layrnorm = vision.post_layernorm = torch.nn.Identity()
    final = vision.adaLN_modulation[1]
    shift, scale = (torch.nn.functional.silu(time) @ final.weight.T + final.bias)[0].split(WIDTH)
    features = network.model.visual_projection(expected[:, 0] * (1 + scale) + shift)
    torch.testing.assert_close(network.image_features(hidden, time), features)


def test_once_trained_the_score_depends_on_the_time():
    network = network_with_random_modulation()
    pixels, tokens, rows = inputs(1)
    with torch.no_grad():
        early, late = (network(pixels, torch.tensor([t]), tokens, rows) for t in (10, 900))
    assert (early - late).abs() > 1e-3


def test_every_weight_receives_a_gradient():
    network = TimeConditionedCLIP(build_clip())
    for name, parameter in network.named_parameters():
        if "adaLN" in name and name.endswith("weight"):
            parameter.data.normal_(std=0.1)
    pixels, tokens, rows = inputs()
    network(pixels, torch.arange(5) * 100, tokens, rows).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []


def test_the_weights_bear_the_names_and_shapes_of_the_authors():
    state = TimeConditionedCLIP(build_clip()).state_dict()
    added = {
        name: tuple(v.shape) for name, v in state.items() if "adaLN" in name or "t_emb" in name
    }
    layers = [f"model.vision_model.encoder.layers.{i}" for i in range(2)]
    assert added == {
        "model.t_embedder.mlp.0.weight": (WIDTH, 256),
        "model.t_embedder.mlp.0.bias": (WIDTH,),
        "model.t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "model.t_embedder.mlp.2.bias": (WIDTH,),
        "model.vision_model.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "model.vision_model.adaLN_modulation.1.bias": (2 * WIDTH,),
        **{f"{layer}.adaLN_modulation.1.weight": (6 * WIDTH, WIDTH) for layer in layers},
        **{f"{layer}.adaLN_modulation.1.bias": (6 * WIDTH,) for layer in layers},
    }
    assert {"model.logit_scale", "model.text_projection.weight"} <= state.keys()


def test_the_initial_values_are_the_published_ones():
    network = TimeConditionedCLIP(build_clip(hidden_size=192), seed=3)
    mlp = network.model.t_embedder.mlp
    assert mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mlp[0].bias.any() and not mlp[2].bias.any()
    bias = network.model.vision_model.encoder.layers[1].adaLN_modulation[1].bias
    assert bias.view(6, -1).mean(dim=1).tolist() == [0, 0, 1, 0, 0, 1]


def test_its_random_weights_come_from_its_seed_alone():
    before = torch.get_rng_state()
    first, second = (
        TimeConditionedCLIP(build_clip(), seed=7).model.t_embedder.mlp[0].weight for _ in range(2)
    )
    assert torch.equal(first, second)
    other = TimeConditionedCLIP(build_clip(), seed=8).model.t_embedder.mlp[0].weight
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
