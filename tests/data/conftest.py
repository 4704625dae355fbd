"""Fixtures for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from diffalign import world
from diffalign.data.batches import ImageBatch
from diffalign.data.layout import Layout
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.source import PairSource
from diffalign.timesteps import TimestepSampling


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make this process believe that it is rank r of n."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(world, "rank", lambda: rank)
        monkeypatch.setattr(world, "size", lambda: size)

    return pretend


def open_source(
    path: Path | str,
    *,
    pairs_per_device: int = 2,
    layout: Layout | None = None,
    skipped: Path | None = None,
    run_seed: int = 0,
    views: frozenset[str] = frozenset({"chosen", "rejected"}),
    **settings: Any,
) -> PairSource:
    """A source of 16-pixel images, decoded in this process unless told otherwise."""
    config = PairConfig(path=str(path), **{"resolution": 16, "workers": 0, **settings})
    return PairSource.open(
        config,
        views=views,
        run_seed=run_seed,
        layout=layout or Layout.start(samples_per_device=pairs_per_device, accumulation=1),
        timesteps=TimestepSampling(),
        schedule_length=1000,
        skipped=skipped,
    )


def take(source: PairSource, count: int) -> list[ImageBatch]:
    """The next batches; the iterator, and with it the workers, end here."""
    batches: Iterator[ImageBatch] = iter(source)
    return list(islice(batches, count))


def ids(batches: list[ImageBatch]) -> list[str]:
    """Sample ids in the order in which they came."""
    return [sample_id for batch in batches for sample_id in batch.sample_ids]
