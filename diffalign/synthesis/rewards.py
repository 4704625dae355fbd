"""Own responses scored by a reward model of responses, and the scores kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.decoding import BadImageError, decode
from diffalign.data.responses.records import Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.files import append_json_lines, read_json_lines
from diffalign.models.devices import choose_device
from diffalign.models.preference.response_scorer import Candidate, ResponseScorer
from diffalign.synthesis.base import Made

REWARDS = "rewards.jsonl"
"""Scores that were computed, one line a response."""


def rewards_of(made: Sequence[Made], reward: Path, folder: Path) -> dict[tuple[str, int], float]:
    """The score of every own response, by question id and number of the sample.

    A question that the model cannot read, of an image that is gone or a conversation beyond its
    context, has none. What was scored before by the same model is read from the file.

    Args:
        made: questions with their responses.
        reward: run of the reward model.
        folder: from which names of images start; gets `rewards.jsonl`.

    Raises:
        ModelError: there is no such model, or it is none of responses.
    """
    scorer = ResponseScorer(reward, device=choose_device("auto"))
    path = folder / REWARDS
    rows: list[Mapping[str, Any]] = read_json_lines(path) if path.is_file() else []
    known = {
        (row["id"], row["sample"], row["response"]): float(row["score"])
        for row in rows
        if row["by"] == scorer.fingerprint
    }
    found = {}
    for some in made:
        samples = list(enumerate(some.values["samples"]))
        missing = [(n, text) for n, text in samples if (some.sample_id, n, text) not in known]
        if missing:
            scores = _scored(scorer, some, [text for _, text in missing], folder)
            new = {
                (some.sample_id, n, text): score
                for (n, text), score in zip(missing, scores, strict=False)
            }
            append_json_lines(
                path,
                [
                    {"id": i, "sample": n, "response": text, "score": x, "by": scorer.fingerprint}
                    for (i, n, text), x in new.items()
                ],
            )
            known |= new
        found.update(
            {
                (some.sample_id, n): known[some.sample_id, n, text]
                for n, text in samples
                if (some.sample_id, n, text) in known
            }
        )
    return found


def _scored(
    scorer: ResponseScorer, some: Made, responses: Sequence[str], folder: Path
) -> list[float]:
    """Scores of responses to one question; none where it cannot be read."""
    try:
        images = [decode(folder / name) for name in some.values["images"]]
        turns = [Turn(role=turn["role"], text=turn["content"]) for turn in some.values["prompt"]]
        return scorer.score(
            [Candidate(turns=turns, images=images, response=text) for text in responses]
        )
    except (BadImageError, OSError, UnusableRowError):
        return []
