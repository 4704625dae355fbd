"""What a user is told of a vision-language model: how it is opened, and how it is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.commands import command, unused
from diffalign.models.lora import LoraSettings
from diffalign.models.runs import in_words


def description(path: str, lora: LoraSettings | None, *, bits: str | None, also: list[str]) -> str:
    """One line for the start of a run: what is trained of which base.

    Args:
        path: of the base.
        lora: of the adapter; None where all weights of the language model train.
        bits: of the frozen language model, such as `4bit`; None where they are its own.
        also: what trains besides.
    """
    if lora is None:
        parts = ["all weights of the language model"]
    else:
        start = f" from {in_words(lora.start)}" if lora.start else ""
        parts = [f"LoRA of rank {lora.rank} on the language model{start}"]
    base = in_words(Path(path)) if Path(path).is_dir() else path
    return f"{base}{f' in {bits}' if bits else ''}, training {', '.join([*parts, *also])}"


def usage(folder: str, *, base: str, lora: LoraSettings | None) -> str:
    """Lines of Python that open the model exported to `folder`.

    Args:
        folder: of the export.
        base: the model below an adapter.
        lora: of the adapter; None where the export is a whole model.
    """
    path = folder if lora is None else base
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"model = AutoModelForImageTextToText.from_pretrained({json.dumps(path)})",
        f"processor = AutoProcessor.from_pretrained({json.dumps(folder)})",
    ]
    if lora is not None:
        lines.insert(0, "from peft import PeftModel")
        lines.insert(-1, f"model = PeftModel.from_pretrained(model, {json.dumps(folder)})")
    return "\n".join(lines)


def next_step(run: Path, settings: Mapping[str, Any]) -> str:
    """What to do with the result of a run: a sentence, and commands below it.

    Args:
        run: its folder.
        settings: of the model, as the evaluations take them.
    """
    asked = {"model.kind": "vlm", **settings, "asking.images": "IMAGES"}
    chair = {"objects": "OBJECTS.json", "synonyms": "SYNONYMS.txt", **asked}
    pope = {"questions": "QUESTIONS.json", **asked, "asking.max_new_tokens": 16}
    return (
        "Count what it hallucinates, and the same of its base:\n  "
        + command("evaluate chair", {**chair, "asking.saves": unused(run / "chair.jsonl")})
        + "\n  "
        + command("evaluate pope", {**pope, "asking.saves": unused(run / "pope.jsonl")})
    )
