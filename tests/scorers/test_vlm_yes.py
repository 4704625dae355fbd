"""On the playground's LLaVA, on a tiny Qwen2-VL, and on an endpoint in this process."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign import config, keys
from diffalign.errors import EndpointError, ModelError
from diffalign.imaging.image_files import to_images
from diffalign.jobs.score import ScoreConfig
from diffalign.judges.endpoint import Endpoint
from diffalign.models.vlm.config import VLM
from diffalign.scorers import vlm_yes
from diffalign.scorers.vlm_yes import VLMYes
from tests.judges.chat_server import serving
from tests.tiny_vlm import tiny_qwen2_vl

LLAVA = str(Path(__file__).parents[2] / "assets/playground/llava")
PROMPTS = ["a red circle", "a blue square in the picture"]


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count, 3, 4, 4), generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size))


def asked_of_transformers(path: str, words: list[str], question: str) -> list[list[float]]:
    """Probabilities of tokens that spell a word, by one forward pass a question, unpadded."""
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    found = []
    for image, prompt in zip(to_images(images()), PROMPTS, strict=True):
        text = question.replace("{prompt}", prompt)
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=chat, images=[image], return_tensors="pt")
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].double().softmax(dim=0)
        vocabulary = processor.tokenizer.get_vocab()
        found.append(
            [
                sum(
                    chances[row].item()
                    for token, row in vocabulary.items()
                    if token.lstrip("Ġ").lower() == word
                )
                for word in words
            ]
        )
    return found


def test_the_score_is_the_probability_of_yes_by_transformers():
    expected = asked_of_transformers(LLAVA, ["yes", "no"], VLMYes(model=VLM(path=LLAVA)).question)
    scorer = VLMYes(model=VLM(path=LLAVA))
    found = scorer.score(images(), PROMPTS).tolist()
    assert found == pytest.approx([yes for yes, _ in expected], abs=1e-4, rel=1e-3)
    question = "Is there {prompt}?"
    expected = asked_of_transformers(LLAVA, ["yes", "no"], question)
    plain = VLMYes(model=VLM(path=LLAVA), question=question)
    found = plain.score(images(), PROMPTS).tolist()
    assert found == pytest.approx([yes for yes, _ in expected], abs=1e-4)
    relative = VLMYes(model=VLM(path=LLAVA), question=question, relative=True)
    found = relative.score(images(), PROMPTS).tolist()
    assert found == pytest.approx([yes / (yes + no) for yes, no in expected], abs=1e-4)
    assert max(found) > 0.01  # the comparison would also hold for zeros
    one_by_one = VLMYes(model=VLM(path=LLAVA), question=question, relative=True, images_per_batch=1)
    assert one_by_one.score(images(), PROMPTS).tolist() == pytest.approx(found, abs=1e-5)


def test_of_qwen_as_well(tmp_path, monkeypatch):
    path = str(tiny_qwen2_vl(tmp_path / "qwen"))
    with pytest.raises(ModelError, match=r"has no token for 'yes'.*whole words"):
        VLMYes(model=VLM(path=path)).score(images(size=16), PROMPTS)
    monkeypatch.setattr(vlm_yes, "YES", "cat")
    monkeypatch.setattr(vlm_yes, "NO", "a")
    scorer = VLMYes(model=VLM(path=path), relative=True)
    expected = asked_of_transformers(path, ["cat", "a"], scorer.question)
    found = scorer.score(images(), PROMPTS).tolist()
    assert found == pytest.approx([yes / (yes + no) for yes, no in expected], abs=1e-4)


def test_settings_are_read_from_a_config_and_tell_scores_apart(tmp_path):
    settings = ["scorer.kind=vlm_yes", f"images={tmp_path}"]
    given = config.load(ScoreConfig, None, [*settings, f"scorer.model.path={LLAVA}"]).scorer
    assert given == VLMYes(model=VLM(path=LLAVA))
    other = VLMYes(model=VLM(path=LLAVA), question="Is it {prompt}?")
    assert other.fingerprint != given.fingerprint
    assert given.fingerprint == VLMYes(model=VLM(path=LLAVA), images_per_batch=1).fingerprint


def test_what_is_asked_must_be_clear():
    with pytest.raises(ValueError, match=r"scorer\.model\.path=FOLDER.*give one of them"):
        VLMYes()
    with pytest.raises(ValueError, match=r"question must hold \{prompt\}"):
        VLMYes(model=VLM(path=LLAVA), question="Is it good?")


def test_it_passes_no_gradient():
    with pytest.raises(ValueError, match="VLMYes passes no gradient to images"):
        VLMYes(model=VLM(path=LLAVA)).score_with_gradient(images(), PROMPTS)


def choice(*tokens: tuple[str, float]) -> dict:
    told = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    first = {"token": tokens[0][0], "logprob": told[0]["logprob"], "top_logprobs": told}
    return {"message": {"content": tokens[0][0]}, "logprobs": {"content": [first]}}


def by_endpoint(server, **changes) -> VLMYes:
    endpoint = Endpoint(address=server.address, model="tiny", pause_s=0.0, attempts=2)
    return VLMYes(endpoint=endpoint, **changes)


def test_an_endpoint_is_shown_the_image_and_asked_for_probabilities():
    def reply(content):
        red = "red" in content[1]["text"]
        return choice(("Yes", 0.5 if red else 0.1), (" yes", 0.1), ("No", 0.3), ("Maybe", 0.1))

    with serving(reply) as server:
        found = by_endpoint(server).score(images(), PROMPTS)
        assert found.tolist() == pytest.approx([0.6, 0.2])
        relative = by_endpoint(server, relative=True).score(images(), PROMPTS)
        assert relative.tolist() == pytest.approx([0.6 / 0.9, 0.2 / 0.5])
    body = next(r for r in server.requests if "red" in r["messages"][0]["content"][1]["text"])
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    shown, asked = body["messages"][0]["content"]
    sent = shown["image_url"]["url"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(sent))) as image:
        assert image.tobytes() == to_images(images())[0].tobytes()
    assert asked["text"] == 'Does this figure show "a red circle"? Please answer yes or no.'


def test_a_reply_of_neither_is_no_score_and_a_no_is_a_low_one():
    with (
        serving(lambda content: choice(("It", 0.9), ("The", 0.1))) as server,
        pytest.raises(ValueError, match=r"begin with neither yes nor no, but with 'It', 'The'"),
    ):
        by_endpoint(server).score(images(), PROMPTS)
    with serving(lambda content: choice(("No", 0.9), ("The", 0.1))) as server:
        assert by_endpoint(server).score(images(), PROMPTS).tolist() == [0.0, 0.0]


def test_an_endpoint_without_probabilities_is_said_at_once():
    with (
        serving(lambda content: "Yes") as server,
        pytest.raises(EndpointError, match=r"tells no log-probabilities .*\(logprobs, top_log"),
    ):
        by_endpoint(server).score(images(1), PROMPTS[:1])
    assert len(server.requests) == 1


def test_a_refusal_is_of_the_image_or_of_everybody(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(keys, "_named", set())
    with serving(lambda content: choice(("Yes", 1.0))) as server:
        server.failures = [413]
        with pytest.raises(ValueError, match="the server refuses it: HTTP 413"):
            by_endpoint(server).score(images(1), PROMPTS[:1])
        server.failures = [401]
        with pytest.raises(EndpointError, match=r"HTTP 401; no key .*endpoint\.key_variable=NAME"):
            by_endpoint(server).score(images(1), PROMPTS[:1])
        server.failures = [503, 503]
        with pytest.raises(EndpointError, match="did not answer in 2 attempts"):
            by_endpoint(server).score(images(1), PROMPTS[:1])
