"""A look at responses before anything is trained: counts, the mapping, the first pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.data.decoding import Size
from diffalign.data.pairs.preview import size_or_reason
from diffalign.data.responses.index import Comparisons
from diffalign.data.responses.reading import OpenedResponses
from diffalign.data.responses.records import ResponsePair
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.skipping import Skipped


@dataclass(frozen=True, kw_only=True)
class ResponsePreviewRow:
    """One pair as the loader would see it."""

    sample_id: str
    prompt: str
    """The user's last turn, markers included; empty where the row cannot be read."""
    responses: Mapping[str, str]
    """Name -> response; empty likewise."""
    own: Mapping[str, str]
    """Name -> the user's last turn, and how many turns and images there are, of a response that
    belongs to another conversation or to other images."""
    images: tuple[Size | str, ...]
    """(height, width) of each, or why it cannot be used."""
    unusable: str | None
    """Why training will skip the pair; None if it will not."""


@dataclass(frozen=True, kw_only=True)
class ResponsePreview:
    """What a dry run shows of the responses."""

    lines: list[str]
    """How the data is read, and what its rows are, as sentences."""
    rows: list[ResponsePreviewRow]


def first_responses(
    data: OpenedResponses, comparisons: Comparisons, maker: TokenSampleMaker, n: int
) -> list[ResponsePreviewRow]:
    """The first `n` pairs in the order of the data set, made into samples as in training."""
    return [
        _row(data.pair(int(number), int(place)), maker) for number, place in comparisons.places[:n]
    ]


def _row(pair: ResponsePair | Skipped, maker: TokenSampleMaker) -> ResponsePreviewRow:
    made = pair if isinstance(pair, Skipped) else maker.make(pair, 0)
    unusable = f"{made.reason.value}: {made.detail}" if isinstance(made, Skipped) else None
    if isinstance(pair, Skipped):
        return ResponsePreviewRow(
            sample_id=pair.sample_id, prompt="", responses={}, own={}, images=(), unusable=unusable
        )
    return ResponsePreviewRow(
        sample_id=pair.sample_id,
        prompt=pair.turns[-1].text,
        responses=pair.responses,
        own={
            name: f"{conversation.turns[-1].text} (its own: {len(conversation.turns)} turns, "
            f"{len(conversation.images)} images)"
            for name, conversation in pair.own.items()
        },
        images=tuple(size_or_reason(image, maker.config.max_pixels) for image in pair.images),
        unusable=unusable,
    )
