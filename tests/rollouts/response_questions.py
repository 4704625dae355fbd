"""Questions about random images, as a file, and rollouts of responses to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.responses import random_image

RESPONSES = (("a red cat", "a dog"), ("no", "yes"), ("the table", "two cats"))


def write_questions(folder: Path, count: int = 6, **changes: Any) -> Path:
    """Rows of an image, a prompt, and the chosen and the rejected response to it.

    Args:
        folder: gets images and `questions.jsonl`.
        count: of rows.
        changes: values of the first row.
    """
    rows: list[dict[str, Any]] = []
    for number in range(count):
        random_image("question", number, size=(20, 12)).save(folder / f"{number}.png")
        chosen, rejected = RESPONSES[number % len(RESPONSES)]
        content = [{"type": "image"}, {"type": "text", "text": "What is it?" + " Look!" * number}]
        rows.append(
            {
                "images": [f"{number}.png"],
                "prompt": [{"role": "user", "content": content}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    rows[0] |= changes
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
