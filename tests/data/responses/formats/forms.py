"""One row of each published form of preferences between responses, as its authors spell it.

Row i asks "What is i?", prefers "It is i." to "It is not i.", and names the image `i.png`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.layouts import encoded, solid_image

Row = dict[str, Any]


def tiny_png(i: int = 0) -> bytes:
    """Four by two pixels, in a colour of its own."""
    return encoded(solid_image((200 - i, i, 0), size=(4, 2)))


def write_lines(folder: Path, rows: Sequence[Row], *, images: int = 10) -> Path:
    """`pairs.jsonl` with `0.png` and so on next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(tiny_png(i))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def write_list(folder: Path, rows: Sequence[Row], *, images: int = 10) -> Path:
    """The same as one JSON list."""
    write_lines(folder, rows, images=images).unlink()
    file = folder / "pairs.json"
    file.write_text(json.dumps(list(rows)), encoding="utf-8")
    return file


def message(role: str, text: str) -> Row:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def trl(i: int) -> Row:
    asked = [{"type": "image"}, {"type": "text", "text": f"What is {i}?"}]
    return {
        "images": [f"{i}.png"],
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [message("assistant", f"It is {i}.")],
        "rejected": [message("assistant", f"It is not {i}.")],
    }


def rlaif_v(i: int) -> Row:
    return {
        "ds_name": "RLAIF-V",
        "image": f"{i}.png",
        "question": f"What is {i}?",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
        "idx": i,
        "image_path": "elsewhere.jpg",
    }


def rlhf_v(i: int) -> Row:
    text = {"question": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"It is not {i}."}
    return {"ds_name": "RLHF-V", "image": f"{i}.png", "text": json.dumps(text), "idx": i}


def povid(i: int) -> Row:
    asked = {"from": "human", "value": f"<image>\nWhat is {i}?"}
    return {
        "id": str(i),
        "image": f"{i}.png",
        "conversations": [asked, {"from": "gpt", "value": f"It is {i}."}],
        "rejected_conversations": [asked, {"from": "gpt", "value": f"It is not {i}."}],
    }


def rated(response: str, *ratings: str) -> Row:
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {
        a: {"Rating": r, "Rationale": "."} for a, r in zip(aspects, ratings, strict=True)
    }
    return {"model": "m", "response": response, "annotations": annotations}


def vlfeedback(i: int) -> Row:
    return {
        "id": str(i),
        "img_path": f"{i}.png",
        "prompt": f"What is {i}?",
        "models": ["a", "b"],
        "completions": [
            rated(f"It is not {i}.", "5", "5", "1"),
            rated(f"It is {i}.", "4", "5", "5"),
        ],
    }


def mdpo(i: int) -> Row:
    return {
        "img_path": f"{i}.png",
        "prompt": "A chat between a curious user and an artificial intelligence assistant. The "
        f"assistant gives helpful responses. USER: <image>\nWhat is {i}? ASSISTANT:",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
    }


def opa_dpo(i: int) -> Row:
    report = {
        "image_description": "A number.",
        "0": {
            "copied_content": f"It is not {i}.",
            "score": 1,
            "error_type": "image_recognition_error",
            "rewritten_content": f"It is {i}, perhaps.",
        },
        "Added": {"rewritten_content": "It is small."},
    }
    return {
        "queries": f"<image>\nWhat is {i}? ASSISTANT:",
        "image_bytes": base64.b64encode(tiny_png(i)).decode(),
        "standard_response": f"It is {i}.",
        "original_generate_response": f"It is not {i}.",
        "AI_pseudo_response": f"It is {i}, perhaps. It is small.",
        "AI_json_report": json.dumps(report),
    }


def sharegpt(i: int) -> Row:
    return {
        "conversations": [{"from": "human", "value": f"<image>What is {i}?"}],
        "chosen": {"from": "gpt", "value": f"It is {i}."},
        "rejected": {"from": "gpt", "value": f"It is not {i}."},
        "images": [f"{i}.png"],
    }


def ms_swift(i: int) -> Row:
    return {
        "messages": [
            {"role": "user", "content": f"<image>What is {i}?"},
            {"role": "assistant", "content": f"It is {i}."},
        ],
        "rejected_response": f"It is not {i}.",
        "images": [f"{i}.png"],
        "rejected_images": ["9.png"],
    }


def re_align(i: int) -> Row:
    asked = {"role": "user", "content": f"<image>\nWhat is {i}?"}
    return {
        "image": f"{i}.png",
        "retrieved_image": "9.png",
        "chosen": [asked, {"role": "assistant", "content": f"It is {i}."}],
        "rejected": [asked, {"role": "assistant", "content": f"It is not {i}."}],
    }


def mask_dpo(i: int) -> Row:
    return {
        "images": [f"{i}.png"],
        "prompt": [{"role": "user", "content": f"What is {i}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {i}."}],
        "rejected": [{"role": "assistant", "content": f"It is not {i}."}],
        "chosen_item": {"sents": [f"It is {i}."], "type": ["no_hallucination"]},
        "rejected_item": {"sents": [f"It is not {i}."], "type": ["hallucination"]},
    }


def mia_dpo(i: int) -> Row:
    return {
        "id": i,
        "image": [f"{i}.png", "9.png"],
        "prompt": f"Image1:<image>\nImage2:<image>\nIn Image1, what is {i}?",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
        "gt": f"It is {i}.",
    }


def unpaired(i: int) -> Row:
    return {
        "images": [f"{i}.png"],
        "prompt": f"What is {i}?",
        "completion": f"It is {i}." if i % 2 == 0 else f"It is not {i}.",
        "label": i % 2 == 0,
    }


def demonstrations(i: int) -> Row:
    """As LLaVA's own data."""
    asked = {"from": "human", "value": f"<image>\nWhat is {i}?"}
    return {
        "id": str(i),
        "image": f"{i}.png",
        "conversations": [asked, {"from": "gpt", "value": f"It is {i}."}],
    }


UNPAIRED: dict[str, Callable[[int], Row]] = {
    form.__name__: form for form in (unpaired, demonstrations)
}


def alpaca(i: int) -> Row:
    return {
        "instruction": "What is",
        "input": f"{i}?",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
        "images": [f"{i}.png"],
    }


def hsa_dpo(i: int) -> Row:
    return {
        "id": f"{i}.png",
        "question": f"What is {i}?",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
        "chosen_score": 1.0,
        "rejected_score": 1.5 + i,
    }


def rationale(i: int) -> Row:
    return {
        "image": f"{i}.png",
        "prompt": f"What is {i}?",
        "chosen": f"It is {i}.",
        "rejected": f"It is not {i}.",
        "rationale": f"The image shows {i}.",
    }


FORMS: dict[str, Callable[[int], Row]] = {
    form.__name__: form
    for form in (
        trl,
        rlaif_v,
        rlhf_v,
        povid,
        vlfeedback,
        mdpo,
        opa_dpo,
        sharegpt,
        ms_swift,
        re_align,
        mask_dpo,
        mia_dpo,
        alpaca,
        hsa_dpo,
        rationale,
    )
}
