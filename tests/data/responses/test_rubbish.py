"""Rows with anything in them: read, left out, or skipped with a reason, and never a traceback."""

import random
from pathlib import Path

import pytest

from diffalign import components
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.records import ResponsePair
from diffalign.data.skipping import LeftOut, Skipped, SkipReason
from tests.data.responses.formats.forms import FORMS, UNPAIRED

KINDS = {**FORMS, **UNPAIRED}
RUBBISH = [
    *(None, "", 0, -1, 1.5, float("nan"), float("inf"), True, [], {}, 10**30, b"x", [[]], [None]),
    *("a.png", "<image>", "</s>", "https://x/y.png", "data:", "file:", "file:///a\0", "\ud800"),
    *({"a": None}, {"type": "image"}, {"type": "text"}, {"role": None}, {"from": "gpt"}),
    *({"role": "user", "content": "x"}, {"role": "assistant", "content": [{"text": None}]}),
    *({"type": "image", "image": [1]}, {"type": "image", "index": 10**9}, {"bytes": "é"}),
    *({"image_url": {"url": {"url": None}}}, {"source": {"source": {}}}, '[{"role": "user"}]'),
]


def spoilt(value, rng):
    """A value with some of it replaced, left out, or added."""
    if rng.random() < 0.15:
        return rng.choice(RUBBISH)
    if isinstance(value, list):
        more = [rng.choice(RUBBISH)] if rng.random() < 0.2 else []
        return [spoilt(each, rng) for each in value] + more
    if isinstance(value, dict):
        kept = {k: spoilt(each, rng) for k, each in value.items() if rng.random() > 0.03}
        added = rng.choice(["images", "image", "system", "label", "prompt", "tool_calls"])
        return {**kept, added: rng.choice(RUBBISH)} if rng.random() < 0.1 else kept
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_row_is_read_or_says_why_not(kind):
    rng = random.Random(kind)
    mapping = components.find(AbstractMapping, kind)()
    outcomes = set()
    for number in range(300):
        row = spoilt(KINDS[kind](number % 10), rng)
        if not isinstance(row, dict):
            continue
        mapping.fits(row)
        values = {**dict.fromkeys(mapping.needs), **row}
        for found in mapping.checked(values, "row"):
            made = found
            if isinstance(found, Comparison):
                made = mapping.pair(found, values, sample_id="row", folder=Path("nowhere"))
            assert isinstance(made, (ResponsePair, Skipped, LeftOut))
            if isinstance(made, Skipped):
                made.detail.encode()  # as it is written into skipped.jsonl
            outcomes.add(type(made))
    assert {ResponsePair, Skipped} <= outcomes


@pytest.mark.parametrize("where", ["prompt", "chosen"])
def test_half_a_character_is_a_malformed_row(where):
    mapping = components.find(AbstractMapping, "trl")()
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", where: "A \ud83d"}
    (found,) = mapping.checked(row, "row")
    assert isinstance(found, Skipped) and found.reason is SkipReason.MALFORMED
