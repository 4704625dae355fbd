"""The samples of a step in micro-batches by length, and how long samples are before they are made.

A sample's length is known once its images are read. Before that its text tells about it, which is
enough to give every rank as much as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from diffalign.data.batches import TokenBatch
from diffalign.data.layout import Layout
from diffalign.data.plans import IndexPlan
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.records import IMAGE
from diffalign.data.responses.samples import TokenSample
from diffalign.data.token_budget import cut, padding_share, share_out
from diffalign.errors import ConfigError
from diffalign.views import View


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """How a run sends responses through its model."""

    shared: bool = False
    """Whether the responses of a sample are branches of one row, where they can be."""
    pack_to: int | None = None
    """See `ResponseConfig`; None also where the model takes no such rows."""


def row_lengths(sample: TokenSample, *, shared: bool) -> list[int]:
    """Tokens of the rows of a sample, in no particular order.

    Args:
        sample: with all that its views need.
        shared: see `ModelRows`.
    """
    views = map(View.parse, sorted(sample.views))
    seen = dict.fromkeys((v.condition, v.response) for v in views if v.response in sample.responses)
    lengths: list[int] = []
    for condition in dict.fromkeys(condition for condition, _ in seen):
        rows = [sample.responses[name].input_ids for c, name in seen if c == condition]
        whole = [len(row) for row in rows]
        if not shared:
            lengths += whole
            continue
        common = min(whole)
        for row in rows[1:]:
            alike = (row[:common] == rows[0][:common]).long()
            common = int(alike.cumprod(dim=0).sum())
        lengths.append(common + sum(length - common for length in whole))
    return lengths


def rows_of_sample(views: frozenset[str], *, paired: bool) -> int:
    """How many rows a sample has at most, each up to the longest that is allowed."""
    parsed = [View.parse(view) for view in views]
    if not paired:
        return len({view.condition for view in parsed})
    return len({(view.response, view.condition) for view in parsed})


def check_budget(tokens: int | None, *, rows: int, max_length: int) -> None:
    """Raise ConfigError where a sample that is allowed might not fit a micro-batch.

    Args:
        tokens: `training.tokens_per_device`.
        rows: see `rows_of_sample`.
        max_length: tokens of one of them at most.
    """
    if tokens is None or rows * max_length <= tokens:
        return
    raise ConfigError(
        f"training.tokens_per_device is {tokens:,}, and one sample may have {rows} rows of "
        f"{max_length:,} tokens (responses.max_length, or the model's context): set it to "
        f"{rows * max_length:,} or more, or responses.max_length to {tokens // rows:,} or less, "
        f"which skips and lists what is longer"
    )


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """Makes batches of samples: one of all, or as many as a number of tokens asks for."""

    pad_token_id: int
    served: frozenset[str]
    """Names of the views that the batches serve."""
    tokens: int | None
    """Of a batch at most, padding included; None makes one batch of all."""
    rows: ModelRows

    def __call__(self, samples: Sequence[TokenSample]) -> tuple[TokenBatch, ...]:
        """Batches that have each sample once, those of long samples first."""
        if self.tokens is None:
            return (self._batch(samples),)
        # where one response is about images of its own, all of its batch have a row each
        shared = self.rows.shared and not any(sample.own_image_inputs for sample in samples)
        lengths = [row_lengths(sample, shared=shared) for sample in samples]
        parts = cut(lengths, tokens=self.tokens, pack_to=self.rows.pack_to)
        return tuple(self._batch([samples[place] for place in part]) for part in parts)

    def _batch(self, samples: Sequence[TokenSample]) -> TokenBatch:
        batch = stack_tokens(samples, self.pad_token_id)
        return replace(batch, views=self.served, pack_to=self.rows.pack_to)


def text_size(comparison: Comparison, read: frozenset[str]) -> tuple[int, int, int, int]:
    """Characters of the conversation, images marked in it, and characters of the responses that are
    read: of all together, and of the longest one."""
    responses = [len(text) for name, text in comparison.responses.items() if name in read]
    return (
        sum(len(turn.text) for turn in comparison.turns),
        sum(turn.text.count(IMAGE) for turn in comparison.turns),
        sum(responses),
        max(responses, default=0),
    )


@dataclass(frozen=True, kw_only=True)
class AboutLengths:
    """About how many tokens the rows of every sample have, told by their text."""

    rows: np.ndarray
    """Float64 [n, k]: k rows of each of n samples."""

    @classmethod
    def of(
        cls, sizes: np.ndarray, samples: Sequence[tuple[int, TokenSample]], *, shared: bool
    ) -> AboutLengths:
        """Learn from a few samples how text becomes tokens.

        Args:
            sizes: `text_size` of every sample, int64 [n, 4].
            samples: some of them, each with its number.
            shared: see `ModelRows`.
        """
        per_character, prompts = 0.25, np.zeros(2)
        if samples:
            numbers = [number for number, _ in samples]
            known = [list(sample.responses.values()) for _, sample in samples]
            own = sum(len(r.tokens) for responses in known for r in responses)
            per_character = own / max(1, int(sizes[numbers, 2].sum()))
            starts = np.array([responses[0].start for responses in known])
            rest = starts - per_character * sizes[numbers, 0]
            marked = np.stack([np.ones(len(numbers)), sizes[numbers, 1]], axis=1)
            prompts = np.linalg.lstsq(marked, rest, rcond=None)[0]
        prompt = per_character * sizes[:, 0] + prompts[0] + prompts[1] * sizes[:, 1]
        count = max((len(sample.responses) for _, sample in samples), default=1)
        if shared or count == 1:
            rows = (prompt + per_character * sizes[:, 2])[:, None]
        else:
            others = prompt + per_character * (sizes[:, 2] - sizes[:, 3]) / (count - 1)
            longest = prompt + per_character * sizes[:, 3]
            rows = np.stack([longest, *[others] * (count - 1)], axis=1)
        return cls(rows=np.maximum(1, rows))

    def describe(self, plan: IndexPlan, layout: Layout, pack_to: int | None) -> str:
        """What cutting by length is worth in the first steps, in one line."""
        assert layout.tokens_per_device is not None
        before: list[list[int]] = []
        after: list[list[int]] = []
        steps = max(1, _LOOKED_AT // layout.samples_per_step)
        for step in range(steps):
            positions = plan.of_step(step * layout.samples_per_step, layout)
            rows = self.rows[[p.member for p in positions]].round().astype(int).tolist()
            size = layout.samples_per_device
            before += [list(chain(*rows[n : n + size])) for n in range(0, len(rows), size)]
            ranks = len(rows) // layout.samples_of_rank
            for share in share_out([sum(of) for of in rows], ranks):
                mine = [rows[place] for place in share]
                parts = cut(mine, tokens=layout.tokens_per_device, pack_to=pack_to)
                after += [[length for n in part for length in mine[n]] for part in parts]
        passes, tokens = len(after) / (steps * ranks), layout.tokens_per_device
        return (
            f"samples of a step are cut by length: about {passes:.1f} forward passes of at most "
            f"{tokens:,} tokens on each device, {padding_share(after, pack_to):.0%} of it padding "
            f"({padding_share(before):.0%} in passes of {layout.samples_per_device} as they come), "
            f"as the texts tell"
        )


_LOOKED_AT = 512
"""Samples whose padding is counted for the start of a run."""
