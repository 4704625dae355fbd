from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import ConfigError, ModelError
from diffalign.synthesis import similarity
from diffalign.synthesis.similarity import SimilarityConfig, digest, embed, nearest, remembered
from tests.responses import random_image
from tests.synthesis.contexts import model, writer


def test_the_stand_in_names_itself_and_knows_equal_texts():
    config = SimilarityConfig(kind="language_model")
    cosines = config.open(writer())(["a cat", "a cat"], ["a cat", "no table here"])
    assert config.name == "mean hidden states of the language model"
    assert cosines[0] == pytest.approx(1.0, abs=1e-5)
    assert cosines[1] < 0.99


def test_auto_takes_what_is_installed(monkeypatch):
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: object())
    assert SimilarityConfig().name == "sentence-transformers/all-mpnet-base-v2"
    assert SimilarityConfig(revision="abc").name.endswith("@abc")
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: None)
    assert SimilarityConfig().chosen == "language_model"
    SimilarityConfig().check()


def test_a_network_that_is_asked_for_and_missing_is_refused(monkeypatch):
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'diffalign\[language\]'"):
        SimilarityConfig(kind="sentence_transformers").check()


def test_a_sentence_network_is_asked_for_tensors(monkeypatch):
    class SentenceTransformer:
        def __init__(self, path, **options):
            assert options["model_kwargs"] == {"use_safetensors": True}

        def encode(self, texts, **_):
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    module = type("module", (), {"SentenceTransformer": SentenceTransformer, "__spec__": object()})
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    compare = SimilarityConfig(kind="sentence_transformers").open(writer())
    assert compare(["ab"], ["ab"]).tolist() == pytest.approx([1.0])


"""Neighbours by the vision tower, against a plain loop and against the tower itself."""


def directions(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=1)


@pytest.mark.parametrize("query", [3, 0, 11])
def test_neighbours_are_exact_and_none_is_its_own(query):
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    cosines = [float(torch.cosine_similarity(features[query], f, dim=0)) for f in features]
    ranked = sorted((i for i in range(12) if i != query), key=lambda i: -cosines[i])
    assert nearest(directions(features), query, k=4) == ranked[:4]


def test_there_are_no_more_neighbours_than_others():
    assert len(nearest(directions(torch.randn(3, 2)), 0, k=9)) == 2


def test_equally_near_ones_come_in_order():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    assert nearest(directions(features), 0, k=3) == [1, 2, 3]


def test_means_and_class_tokens_are_those_of_the_tower():
    loaded = model()
    images = [random_image(n, size=(20, 12)) for n in range(3)]
    pixels = loaded.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        layers = loaded.network.tower(pixels, output_hidden_states=True).hidden_states
    states = layers[loaded.network.model.config.vision_feature_layer]
    assert torch.allclose(embed(loaded, images, pooling="cls"), states[:, 0], atol=1e-6)
    mean = embed(loaded, images, pooling="mean")
    assert torch.allclose(mean, states[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_company_changes_no_vector(family):
    images = [random_image(n, size=size) for n, size in enumerate([(20, 12), (12, 24)])]
    together = embed(model(family), images, pooling="mean")
    alone = torch.cat([embed(model(family), [some], pooling="mean") for some in images])
    assert len(together) == 2 and torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_tower_without_a_class_token_is_refused():
    with pytest.raises(ModelError, match="use mean"):
        embed(model("qwen2_vl"), [random_image(0, size=(16, 16))], pooling="cls")


def test_a_image_is_the_same_under_any_name(tmp_path):
    for name in ("a.png", "b.png"):
        random_image(0, size=(4, 4)).save(tmp_path / name)
    assert digest(tmp_path / "a.png") == digest((tmp_path / "b.png").read_bytes())


def test_tensors_are_computed_once_a_key(tmp_path):
    path = tmp_path / "features.safetensors"
    counts = iter(range(9))

    def compute():
        return {"x": torch.tensor([float(next(counts))])}

    assert [float(remembered(path, key, compute)["x"]) for key in "aabb"] == [0, 0, 1, 1]
    assert float(load_file(path)["x"]) == 1
