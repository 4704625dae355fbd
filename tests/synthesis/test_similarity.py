from __future__ import annotations

import sys

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.synthesis import similarity
from diffalign.synthesis.similarity import SimilarityConfig
from tests.synthesis.benches import writer


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
