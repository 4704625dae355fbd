"""The model's own responses, and the pairs that are made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from diffalign.data.responses.records import Turn
from diffalign.errors import ModelError
from diffalign.judges.base import AbstractJudge
from diffalign.models.preference.heads.linear import Linear
from diffalign.models.preference.response_scorer import Candidate, ResponseScorer
from diffalign.models.preference.vlm_reward import VLMReward
from diffalign.models.vlm.config import VLM
from diffalign.synthesis.base import Made
from diffalign.synthesis.self_sampled import OwnResponses
from tests.responses import random_image
from tests.synthesis.contexts import RESPONSES, folder, make


@dataclass(frozen=True, kw_only=True)
class Corrector(AbstractJudge):
    """Rewrites every response as one sentence."""

    @property
    def name(self):
        return "corrector"

    def replies(self, prompts):
        for place, prompt in enumerate(prompts):
            own = prompt.rpartition("Response of the model: ")[2]
            report = {"0": {"copied_content": own, "score": 2, "rewritten_content": "True."}}
            yield place, json.dumps(report)


def sampled(*texts, sample_id="a", response="truth"):
    prompt = [{"role": "user", "content": "<image>\nWhy?"}]
    values = {"images": ["a.png"], "prompt": prompt, "answer": response, "samples": list(texts)}
    return Made(sample_id=sample_id, values=values)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_distinct_samples_are_kept_and_depend_on_nothing_but_their_question(tmp_path):
    method = OwnResponses(samples=3, temperature=1.0, max_new_tokens=4)
    made = make(method, tmp_path)
    assert all(len(set(some.values["samples"])) == 3 for some in made)
    assert made == make(method, tmp_path, batch_size=5)
    assert [some.values["answer"] for some in made] == list(RESPONSES)


def test_samples_that_are_alike_count_once(tmp_path):
    method = OwnResponses(samples=4, temperature=1e-4, max_new_tokens=3)
    assert [len(some.values["samples"]) for some in make(method, tmp_path)] == [1] * 4


def test_the_truth_is_preferred_to_an_own_response(tmp_path):
    made = [sampled("truth", "lie", "fib"), sampled("truth", sample_id="b")]
    pair, same = OwnResponses().pairs(made, tmp_path)
    assert (pair.values["chosen"], pair.values["rejected"]) == ("truth", "lie")
    assert same.reason == "the responses are the same"
    first, second, _ = OwnResponses(pairs_per_question=2).pairs(made, tmp_path)
    assert [first.sample_id, second.sample_id] == ["a#0", "a#1"]
    (none,) = OwnResponses().pairs([sampled("x", response="")], tmp_path)
    assert none.reason == "the data set has no response"


def test_corrections_give_three_responses(tmp_path):
    report = {"0": {"copied_content": "lie", "score": 1}}
    path = lines(tmp_path / "c.jsonl", {"id": "a", "revised": "better", "report": report})
    method = OwnResponses(corrections=path)
    row, left_out = method.pairs([sampled("lie"), sampled("x", sample_id="b")], tmp_path)
    assert method.form == "opa_dpo"
    assert row.values == {
        "image": ["a.png"],
        "queries": "<image>\nWhy?",
        "standard_response": "truth",
        "original_generate_response": "lie",
        "AI_pseudo_response": "better",
        "AI_json_report": json.dumps(report),
    }
    assert left_out.reason == "no correction"


def test_a_judge_is_asked_once(tmp_path, monkeypatch):
    method = OwnResponses(judge=Corrector())
    first = method.pairs([sampled("lie")], tmp_path)
    assert first[0].values["AI_pseudo_response"] == "True."
    monkeypatch.setattr(Corrector, "replies", lambda *_: pytest.fail("asked again"))
    assert method.pairs([sampled("lie")], tmp_path) == first


@pytest.mark.parametrize("kind", ["corrections", "scores"])
def test_what_is_said_of_responses_that_are_not_there_is_listed(tmp_path, kind):
    rows = [
        {"id": name, "sample": n, "revised": "x", "score": n}
        for name, n in (("a", 0), ("a", 1), ("a", 2), ("b", 0))
    ]
    method = OwnResponses(**{kind: lines(tmp_path / "f.jsonl", *rows)})
    *unknown, pair = method.pairs([sampled("one", "two")], tmp_path)
    assert isinstance(pair, Made)
    assert [(some.sample_id, some.detail) for some in unknown] == [
        ("a", "sample 2"),
        ("b", "sample 0"),
    ]
    assert {some.reason for some in unknown} == {"corrected or scored, but not made"}


def test_scores_make_pairs_of_own_responses(tmp_path):
    scores = [("a", 0, 0), ("a", 1, -2), ("b", 0, -1), ("b", 1, -1), ("c", 0, 0)]
    path = lines(
        tmp_path / "s.jsonl",
        *({"id": i, "sample": n, "score": score} for i, n, score in scores),
    )
    made = [sampled("one", "two", sample_id=name) for name in "abc"]
    found = OwnResponses(scores=path).pairs(made, tmp_path)
    by_id = {some.sample_id: some for some in found}
    assert (by_id["a"].values["chosen"], by_id["a"].values["rejected"]) == ("one", "two")
    assert by_id["b"].reason == "no two scores differ enough"
    assert by_id["c"].reason == "fewer than two scored responses"


def test_long_rejected_responses_are_left_out_until_lengths_agree(tmp_path):
    path = lines(
        tmp_path / "s.jsonl",
        *({"id": name, "sample": n, "score": -n} for name in "abc" for n in range(2)),
    )
    made = [
        sampled("x", "y z", sample_id="a"),
        sampled("v w x y", "x y z", sample_id="b"),
        sampled("x", "a b c d e f g h i j", sample_id="c"),
    ]
    reasons = {
        some.sample_id: getattr(some, "reason", "kept")
        for some in OwnResponses(scores=path).pairs(made, tmp_path)
    }
    assert reasons == {"a": "kept", "b": "kept", "c": "rejected side too long"}
    everything = OwnResponses(scores=path, balance_lengths=False).pairs(made, tmp_path)
    assert all(isinstance(some, Made) for some in everything)


def test_earlier_turns_become_the_template_that_is_read_back(tmp_path):
    some = sampled("lie")
    prompt = [
        {"role": "user", "content": "<image>\nWho?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    some.values["prompt"][:] = prompt
    (row,) = OwnResponses(judge=Corrector()).pairs([some], tmp_path)
    assert row.values["queries"] == "USER: <image>\nWho? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"samples": 2, "temperature": 0.0}, "would all be the same"),
        ({"corrections": "a", "scores": "b"}, "corrections and scores exclude each other"),
        ({"samples": 0}, "at least 1"),
    ],
)
def test_settings_that_clash_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        OwnResponses(**settings)


def test_a_reward_model_of_responses_ranks_them_and_its_scores_are_kept(tmp_path, monkeypatch):
    model = str(folder("llava"))
    settings = VLMReward(candidates="responses", base=VLM(path=model), head=Linear())
    trained = settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained.trained_parameters():
        if name.startswith("head."):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    trained.export(tmp_path / "reward")
    image = random_image("reward", size=(20, 16))
    image.save(tmp_path / "a.png")
    method = OwnResponses(reward=tmp_path / "reward", min_gap=0.0, balance_lengths=False)
    texts = ("a cat", "two dogs and a table", "T")
    scores = ResponseScorer(tmp_path / "reward").score(
        [
            Candidate(
                turns=[Turn(role="user", text="<image>\nWhy?")], images=[image], response=text
            )
            for text in texts
        ]
    )
    (best,) = method.pairs([sampled(*texts)], tmp_path)
    ranked = sorted(texts, key=dict(zip(texts, scores, strict=True)).__getitem__)
    assert (best.values["chosen"], best.values["rejected"]) == (ranked[-1], ranked[0])
    kept = [json.loads(line) for line in (tmp_path / "rewards.jsonl").open()]
    assert [row["score"] for row in kept] == pytest.approx(scores, abs=1e-4)
    monkeypatch.setattr(ResponseScorer, "score", None)  # nothing is scored again
    assert method.pairs([sampled(*texts)], tmp_path) == [best]


def test_a_question_that_the_reward_model_cannot_see_has_no_pair(tmp_path):
    settings = VLMReward(candidates="responses", base=VLM(path=str(folder("llava"))), head=Linear())
    settings.load(device=torch.device("cpu"), compute_dtype=torch.float32, reference="none").export(
        tmp_path / "reward"
    )
    (left_out,) = OwnResponses(reward=tmp_path / "reward").pairs([sampled("x", "y")], tmp_path)
    assert left_out.reason == "fewer than two scored responses"
    with pytest.raises(ModelError, match="is no trained reward model"):
        OwnResponses(reward=tmp_path).check()
    with pytest.raises(ValueError, match="scores and reward exclude each other"):
        OwnResponses(reward=tmp_path, scores=tmp_path / "s.jsonl")
