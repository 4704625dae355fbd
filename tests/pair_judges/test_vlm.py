"""On the playground's LLaVA, on a tiny Qwen2-VL, and on an endpoint in this process."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign import config
from diffalign.imaging.image_files import to_images
from diffalign.jobs.score import ScoreConfig
from diffalign.judges.endpoint import Endpoint
from diffalign.models.vlm.config import VLM
from diffalign.pair_judges.base import in_both_orders
from diffalign.pair_judges.vlm import VLMPairJudge
from diffalign.scorers.pairwise import Pairwise
from tests.judges.chat_server import serving
from tests.scorers.test_vlm_yes import choice, images
from tests.tiny_vlm import tiny_qwen2_vl

LLAVA = str(Path(__file__).parents[2] / "assets/playground/llava")
PROMPTS = ["a red circle", "a blue square"]


def asked_of_transformers(path: str, first, second, question: str) -> list[float]:
    """P(1) / (P(1) + P(2)) by one forward pass a question, unpadded, by transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    vocabulary = processor.tokenizer.get_vocab()
    found = []
    for one, other, prompt in zip(first, second, PROMPTS, strict=True):
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        chat = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        inputs = processor(text=chat, images=[one, other], return_tensors="pt")
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].double().softmax(dim=0)
        p = [
            sum(chances[row].item() for t, row in vocabulary.items() if t.lstrip("Ġ") == answer)
            for answer in ("1", "2")
        ]
        found.append(p[0] / sum(p))
    return found


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_verdict_is_the_odds_of_the_answers_by_transformers(family, tmp_path):
    path = LLAVA if family == "llava" else str(tiny_qwen2_vl(tmp_path / "qwen"))
    first, second = to_images(images(2)), to_images(images(2).flip(0) * -1)
    judge = VLMPairJudge(model=VLM(path=path))
    found = judge.prefers(first, second, PROMPTS).tolist()
    expected = asked_of_transformers(path, first, second, judge.question)
    assert found == pytest.approx(expected, abs=1e-4)
    orders = in_both_orders(judge, first, second, PROMPTS)
    swapped = asked_of_transformers(path, second, first, judge.question)
    assert orders.backward.tolist() == pytest.approx(swapped, abs=1e-4)
    assert max(abs(a + b - 1) for a, b in zip(expected, swapped, strict=True)) > 1e-3  # it leans


def test_an_endpoint_sees_both_images_in_their_order():
    one, other = to_images(images(2))

    def reply(content):
        assert "a red circle" in content[2]["text"] and "Which" in content[2]["text"]
        return choice(("1", 0.6), ("2", 0.1), (" 2", 0.1), ("The", 0.2))

    with serving(reply) as server:
        endpoint = Endpoint(address=server.address, model="tiny", pause_s=0.0, attempts=2)
        judge = VLMPairJudge(endpoint=endpoint)
        found = in_both_orders(judge, [one], [other], PROMPTS[:1])
    assert found.forward.item() == found.backward.item() == pytest.approx(0.75)
    assert found.preference.item() == pytest.approx(0.5)  # it says the first whatever it sees
    shown = {
        tuple(_pixels(part) for part in r["messages"][0]["content"][:2]) for r in server.requests
    }
    assert shown == {(one.tobytes(), other.tobytes()), (other.tobytes(), one.tobytes())}


def _pixels(part) -> bytes:
    sent = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(sent))) as image:
        return image.tobytes()


def test_settings_are_read_from_a_config_and_tell_verdicts_apart(tmp_path):
    settings = [f"images={tmp_path}", "scorer.kind=pairwise", "scorer.judge.kind=vlm"]
    given = config.load(ScoreConfig, None, [*settings, f"scorer.judge.model.path={LLAVA}"]).scorer
    assert given == Pairwise(judge=VLMPairJudge(model=VLM(path=LLAVA)))
    other = VLMPairJudge(model=VLM(path=LLAVA), answers=("first", "second"))
    assert len({given.judge.fingerprint, other.fingerprint}) == 2


def test_what_is_asked_must_be_clear():
    model = VLM(path=LLAVA)
    with pytest.raises(ValueError, match=r"scorer\.judge\.model\.path=FOLDER.*give one of them"):
        VLMPairJudge()
    with pytest.raises(ValueError, match=r"question must hold \{prompt\}"):
        VLMPairJudge(model=model, question="Which is good?")
    with pytest.raises(ValueError, match="answers are two"):
        VLMPairJudge(model=model, answers=("1", "1"))
    with pytest.raises(ValueError, match="words in lower case"):
        VLMPairJudge(model=model, answers=("A", "B"))
