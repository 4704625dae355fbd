from dataclasses import dataclass

from diffalign import components, config
from diffalign.data.responses.token_weights.base import AbstractTokenWeights
from diffalign.data.responses.token_weights.scores import Scores
from diffalign.data.responses.token_weights.sentences import Sentences


@dataclass(frozen=True, kw_only=True)
class Weights:
    weights: dict[str, AbstractTokenWeights]


def test_every_kind_is_found_by_its_module():
    kinds = components.kinds(AbstractTokenWeights)
    assert kinds == ["changed", "scores", "sentences", "severity", "shared_length"]


def test_weights_are_read_from_a_config_by_name():
    given = [
        "weights={score: {kind: scores, by_score: {1: 2.5, 4: 1}}, "
        "kept: {kind: sentences, kept: {chosen: [right]}}}"
    ]
    loaded = config.load(Weights, overrides=given)
    assert loaded.weights == {
        "score": Scores(by_score={"1": 2.5, "4": 1.0}),
        "kept": Sentences(kept={"chosen": ("right",)}),
    }
