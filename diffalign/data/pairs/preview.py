"""A look at a data set before anything is trained: counts, the mapping, the first pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

from diffalign.data.decoding import Size, size_or_reason
from diffalign.data.location import locate
from diffalign.data.pairs.columns import PAIR_VIEWS, ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs
from diffalign.data.pairs.samples import empty_caption
from diffalign.data.skipping import Skipped
from diffalign.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PairPreviewRow:
    """One pair as the loader would see it."""

    sample_id: str
    prompt: str
    chosen: Size | str
    """(height, width), or why the image cannot be used."""
    rejected: Size | str | None
    """None where the data set has preferred images alone."""
    unusable: str | None = None
    """Why training will skip the pair; None if it will not."""


def without_download(config: PairConfig) -> PairConfig:
    """The config for a look at the data: a hub data set is streamed, and so its rows not counted.

    Raises:
        DataError: nothing is there.
    """
    location = locate(config)
    if location.root is not None or location.stored:
        return config
    scores = dataclasses.replace(config.scores, order=None)
    return dataclasses.replace(config, streaming=True, buckets=False, holdout=None, scores=scores)


def first_rows(
    data: OpenedPairs, n: int, config: PairConfig, views: Collection[str] = PAIR_VIEWS
) -> list[PairPreviewRow]:
    """The first `n` pairs in the order of the data set, decoded to learn their size.

    Args:
        data: of the pairs.
        n: at most so many.
        config: of the data.
        views: the sides that will be read.

    Raises:
        DataError: a label is not allowed, or no row is a pair.
    """
    count = n if config.limit is None else min(n, config.limit)
    sides = data.columns.sides
    rows = [
        _preview_row(pair, config.max_pixels, sides, views) for pair in islice(data.pairs(), count)
    ]
    if count and not rows:
        raise DataError(f"{data.summary}: no row holds a preference")
    return rows


def _preview_row(
    pair: ImagePair | Skipped, max_pixels: int, sides: Collection[str], views: Collection[str]
) -> PairPreviewRow:
    if isinstance(pair, Skipped):
        reason = f"{pair.reason.value}: {pair.detail}"
        shown: dict[str, Size | str] = dict.fromkeys(sides, "not read")
        shown[pair.side or "chosen"] = reason
        prompt, reasons = "", [reason]
    else:
        shown = {side: size_or_reason(getattr(pair, side), max_pixels) for side in sides}
        without = empty_caption(pair.sample_id, pair.prompt)
        reasons = [f"{side}: {shown[side]}" for side in views if isinstance(shown[side], str)]
        if without is not None:
            reasons.insert(0, f"{without.reason.value}: {without.detail}")
        prompt = pair.prompt
    return PairPreviewRow(
        sample_id=pair.sample_id,
        prompt=prompt,
        chosen=shown["chosen"],
        rejected=shown.get("rejected"),
        unusable="; ".join(reasons) or None,
    )
