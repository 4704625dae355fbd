"""Steps of a source that are cut by length: on several ranks, resumed, with unusable rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from diffalign.data.batches import TokenBatch
from diffalign.data.layout import Layout
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.corruptions.diffuse import Diffuse
from diffalign.data.responses.micro_batches import (
    AboutLengths,
    row_lengths,
    rows_of_sample,
    text_size,
)
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.responses.source import ResponseSource
from diffalign.data.responses.token_weights.changed import Changed
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import write_lines
from tests.responses import pair
from tests.tiny_vlm import tiny_llava

BOTH = frozenset({"chosen", "rejected"})
SAMPLES, TOKENS = 8, 256


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return AutoProcessor.from_pretrained(tiny_llava(tmp_path_factory.mktemp("llava")))


def rows(count: int) -> list[dict[str, Any]]:
    """Of unequal lengths, in no order."""
    return [
        {
            **forms.rlaif_v(i),
            "chosen": "yes " * (1 + i % 5),
            "rejected": "no " * (1 + 3 * i % 7),
        }
        for i in range(1, 1 + count)
    ]


def open_source(
    path: Any, processor: Any, *, layout: Layout | None = None, **settings: Any
) -> ResponseSource:
    config = ResponseConfig(path=str(path), **{"workers": 0, "max_length": 128, **settings})
    return ResponseSource.open(
        config,
        views=BOTH,
        run_seed=0,
        layout=layout
        or Layout.start(samples_per_device=4, accumulation=2, tokens_per_device=TOKENS),
        processor=processor,
        skipped=None,
        shares_prefix=True,
    )


def step(batches: Iterator[TokenBatch], samples: int = SAMPLES) -> list[TokenBatch]:
    """The micro-batches of a step on this rank."""
    found: list[TokenBatch] = []
    while sum(map(len, found)) < samples:
        found.append(next(batches))
    assert sum(map(len, found)) == samples
    return found


def names(batches: list[TokenBatch]) -> list[str]:
    return sorted(name for batch in batches for name in batch.sample_ids)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_samples_of_a_step_and_its_tokens(processor, as_rank, tmp_path, ranks):
    write_lines(tmp_path, rows(9))
    whole = open_source(tmp_path, processor)
    one = iter(whole)
    start = Layout.start(samples_per_device=4, accumulation=2, tokens_per_device=TOKENS)
    parts, states = [], []
    for rank in range(ranks):
        as_rank(rank, ranks)
        layout = start.on_these_processes(SAMPLES // ranks)
        source = open_source(tmp_path, processor, layout=layout)
        batches = iter(source)
        parts.append([step(batches, SAMPLES // ranks) for _ in range(3)])
        states.append(source.state_dict())
    as_rank(0, 1)
    for number in range(3):
        together = [batch for of_rank in parts for batch in of_rank[number]]
        assert names(together) == names(step(one))
        tokens = [
            sum(
                int(b.responses[name].attention_mask.sum())
                for b in of_rank[number]
                for name in BOTH
            )
            for of_rank in parts
        ]
        assert max(tokens) < 1.25 * min(tokens)
    assert all(state == whole.state_dict() for state in states)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_source_goes_on_with_the_next_step(processor, tmp_path, workers):
    write_lines(tmp_path, rows(9))
    source = open_source(tmp_path, processor, workers=workers)
    batches = iter(source)
    step(batches)
    state = json.loads(json.dumps(source.state_dict()))
    expected = [batch.sample_ids for _ in range(2) for batch in step(batches)]
    resumed = open_source(tmp_path, processor)
    resumed.load_state_dict(state)
    again = iter(resumed)
    assert [batch.sample_ids for _ in range(2) for batch in step(again)] == expected


def test_a_row_that_cannot_be_used_is_replaced_and_counted(processor, tmp_path):
    bad = {**forms.rlaif_v(1), "image": "gone.png"}
    write_lines(tmp_path, [*rows(9), bad])
    source = open_source(tmp_path, processor, max_bad_fraction=0.5)
    batches = iter(source)
    seen = [name for _ in range(4) for name in names(step(batches))]
    assert "pairs.jsonl:10" not in seen
    assert source.skipped_counts == {"missing image": 1}


def test_the_start_says_what_cutting_is_worth(processor, tmp_path):
    write_lines(tmp_path, rows(9))
    (line,) = open_source(tmp_path, processor).further_lines()
    assert "of at most 256 tokens on each device" in line
    assert "in passes of 4 as they come" in line
    plain = Layout.start(samples_per_device=4, accumulation=2)
    assert open_source(tmp_path, processor, layout=plain).further_lines() == []


@pytest.mark.parametrize("shared", [True, False])
def test_texts_tell_about_how_long_rows_are(processor, tmp_path, shared):
    write_lines(tmp_path, rows(30), images=31)
    source: Any = open_source(tmp_path, processor)
    assert source._comparisons.sizes is not None
    true = np.array(
        [
            row_lengths(source._maker.make(source._data.pair(row, place), 0), shared=shared)
            for row, place in source._comparisons.places.tolist()
        ]
    )
    made = [(number, source._maker.make(source._data.pair(number, 0), 0)) for number in range(6)]
    about = AboutLengths.of(source._comparisons.sizes, made, shared=shared).rows
    assert about.shape == true.shape
    assert np.abs(about.sum(1) / true.sum(1) - 1).max() < 0.15
    assert np.corrcoef(about.sum(1), true.sum(1))[0, 1] > 0.9


def test_rows_of_a_sample_are_those_that_go_through_the_model(processor):
    views = frozenset({"chosen", "rejected", "chosen@diffuse", "rejected:changed"})
    maker: Any = TokenSampleMaker(
        config=ResponseConfig(
            path="unused", conditions={"diffuse": Diffuse()}, weights={"changed": Changed()}
        ),
        views=views,
        run_seed=0,
        encoder=ChatEncoder(processor),
    )
    sample = maker.make(pair(0, 1), 0)
    chosen, rejected = (sample.responses[name] for name in ("chosen", "rejected"))
    apart = sorted([len(chosen.input_ids)] * 2 + [len(rejected.input_ids)])
    assert sorted(row_lengths(sample, shared=False)) == apart
    common = next(
        n
        for n, (one, other) in enumerate(zip(chosen.input_ids, rejected.input_ids, strict=False))
        if one != other
    )
    both = len(chosen.input_ids) + len(rejected.input_ids) - common
    assert sorted(row_lengths(sample, shared=True)) == sorted([len(chosen.input_ids), both])
    assert rows_of_sample(views, paired=True) == 3
    assert rows_of_sample(views, paired=False) == 2


def test_the_size_of_a_text_counts_what_is_read():
    whole = pair(1, 2)
    comparison = Comparison(
        turns=whole.turns, responses={"chosen": "abc", "rejected": "ab", "x": "?"}
    )
    assert text_size(comparison, BOTH) == (len(whole.turns[0].text), 2, 5, 3)
