"""The files that training reads, made of answers: pairs with votes, D3PO's groups, responses.

Every file of votes has its provenance in its metadata, under `diffalign.labels`; who the people are
stays in the file of answers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from diffalign.data.decoding import BadImageError, content_of
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError
from diffalign.files import replacing_file, write_json_lines, writing
from diffalign.labelling.answers import Answer
from diffalign.labelling.items import AbstractItems, Content

PAIRS, PREFERENCES, RESPONSES = "pairs.parquet", "preferences.jsonl", "responses.parquet"
"""Files in the folder of the labels."""
_KEY = b"diffalign.labels"
_ROWS_AT_ONCE = 50
"""Of a row group: readers of streams want them small."""

_PAIR = [
    ("caption", pa.string()),
    ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()),
    ("label_0", pa.float64()),
    ("label_1", pa.float64()),
    ("votes_0", pa.float64()),
    ("votes_1", pa.float64()),
    ("ties", pa.int64()),
    ("both_bad", pa.int64()),
    ("has_label", pa.bool_()),
    ("ranking_id", pa.int64()),
    ("image_0_uid", pa.string()),
    ("image_1_uid", pa.string()),
    ("model_0", pa.string()),
    ("model_1", pa.string()),
]
"""Pick-a-Pic's columns, and the counts that its labels are made of."""
_BLOCK = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_BLOCK))]))
_RESPONSE = [
    ("prompt", _MESSAGES),
    ("chosen", _MESSAGES),
    ("rejected", _MESSAGES),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("votes_chosen", pa.float64()),
    ("votes_rejected", pa.float64()),
]
"""TRL's conversational preferences about images, and the votes."""


@dataclass
class Votes:
    """What people say of two sides, by their order in the data."""

    first: int = 0
    second: int = 0
    tie: int = 0
    both_bad: int = 0

    @property
    def counts(self) -> tuple[float, float]:
        """Votes of either side; a tie is half a vote for each, and bad ones are for none."""
        return self.first + self.tie / 2, self.second + self.tie / 2


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file, and what it holds."""

    path: Path
    rows: int
    said: str
    """What is in it and what is not, as half a sentence."""


def votes_of(answers: Iterable[Answer]) -> dict[str, dict[tuple[int, int], Votes]]:
    """Item -> two of its sides -> votes."""
    found: dict[str, dict[tuple[int, int], Votes]] = defaultdict(lambda: defaultdict(Votes))
    for answer in answers:
        for sides, verdict in answer.verdicts():
            votes = found[answer.item][sides]
            setattr(votes, verdict, getattr(votes, verdict) + 1)
    return found


def write_votes(
    items: AbstractItems, answers: Sequence[Answer], folder: Path, provenance: Mapping[str, Any]
) -> Written:
    """Write pairs of images, or of responses, with their votes.

    Args:
        items: what was shown.
        answers: that stand.
        folder: gets `pairs.parquet` or `responses.parquet`, whole or not at all.
        provenance: of the metadata.

    Raises:
        DataError: an image or a response is no longer the one that was judged, or the disk refuses.
    """
    of_images = items.shows == "images"
    path = folder / (PAIRS if of_images else RESPONSES)
    schema = pa.schema(_PAIR if of_images else _RESPONSE)
    schema = schema.with_metadata({_KEY: json.dumps(provenance, ensure_ascii=False).encode()})
    rows = 0
    undecided = 0
    with (
        writing(path),
        replacing_file(path) as draft,
        pyarrow.parquet.ParquetWriter(draft, schema) as writer,
    ):
        waiting: list[dict[str, Any]] = []
        for row in _rows(items, answers):
            if row is None:
                undecided += 1
                continue
            rows += 1
            waiting.append(row)
            if len(waiting) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    why = "both bad or skipped" if of_images else "tied, both bad or skipped"
    left_out = f", {undecided:,} left out: {why} alone" if undecided else ""
    return Written(path=path, rows=rows, said=f"{rows:,} pairs with votes{left_out}")


def _rows(items: AbstractItems, answers: Sequence[Answer]) -> Iterator[dict[str, Any] | None]:
    """A row for each two sides that votes decide; None for others that were answered."""
    votes = votes_of(answers)
    judged = {answer.item: answer.digests for answer in answers}
    for number, item in enumerate(items.items):
        if item.item_id not in judged:
            continue
        content = _unchanged(items, number, judged[item.item_id])
        pairs = votes.get(item.item_id, {})
        if not pairs:
            yield None
        for (one, other), of in sorted(pairs.items()):
            counts = of.counts
            if items.shows == "images":
                models = [item.models[n] if item.models else None for n in (one, other)]
                yield _pair(number, content, (one, other), of, models) if any(counts) else None
            else:
                yield None if counts[0] == counts[1] else _response(content, counts)


def _unchanged(items: AbstractItems, number: int, judged: Sequence[str]) -> Content:
    """The content of an item, which must be what people saw."""
    name = items.items[number].item_id
    try:
        content = items.content(number)
        same = tuple(content.digests()) == tuple(judged)
    except (BadImageError, UnusableRowError) as error:
        raise DataError(
            f"{name}: what people judged cannot be read any more ({error.detail}): put it back, "
            f"and ask for the files again; the answers are safe"
        ) from error
    if not same:
        raise DataError(
            f"{name}: the data is no longer what people judged: an image or a response has changed "
            f"since. Put it back, or label anew into another folder; the answers are safe"
        )
    return content


def _pair(
    number: int,
    content: Content,
    sides: tuple[int, int],
    votes: Votes,
    models: Sequence[str | None],
) -> dict[str, Any]:
    first, second = votes.counts
    digests = content.digests()
    label = 0.5 if first == second else float(first > second)
    files = [content_of(content.images[side]) for side in sides]
    return {
        "caption": content.prompt,
        "jpg_0": files[0],
        "jpg_1": files[1],
        "label_0": label,
        "label_1": 1 - label,
        "votes_0": first,
        "votes_1": second,
        "ties": votes.tie,
        "both_bad": votes.both_bad,
        "has_label": True,
        "ranking_id": number,
        "image_0_uid": digests[sides[0]],
        "image_1_uid": digests[sides[1]],
        "model_0": models[0],
        "model_1": models[1],
    }


def _response(content: Content, counts: tuple[float, float]) -> dict[str, Any]:
    won = int(counts[1] > counts[0])
    return {
        "prompt": [_message(turn) for turn in content.turns],
        "chosen": [_message(Turn(role="assistant", text=content.responses[won]))],
        "rejected": [_message(Turn(role="assistant", text=content.responses[1 - won]))],
        "images": [{"bytes": content_of(image), "path": None} for image in content.images],
        "votes_chosen": counts[won],
        "votes_rejected": counts[1 - won],
    }


def _message(turn: Turn) -> dict[str, Any]:
    blocks: list[dict[str, str | None]] = []
    for place, text in enumerate(turn.text.split(IMAGE)):
        if place:
            blocks.append({"type": "image", "text": None})
        if text:
            blocks.append({"type": "text", "text": text})
    return {"role": turn.role, "content": blocks}


# --- groups ---------------------------------------------------------------------------------------


def write_preferences(answers: Sequence[Answer], folder: Path) -> Written:
    """Write the rankings of groups as D3PO's training reads them.

    A group that one person ranked has that ranking. Where several did, each pair of images is
    decided by the majority, and the pairs that would contradict stronger ones in a circle are left
    out, the weakest majorities first (Tideman 1987, ranked pairs).

    Args:
        answers: that stand.
        folder: gets `preferences.jsonl`.

    Raises:
        DataError: the disk refuses.
    """
    rankings: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.ranking is not None:
            rankings[answer.item].append(answer)
    lines: list[dict[str, Any]] = []
    circles = 0
    for group, given in rankings.items():
        if len(given) == 1 and given[0].ranking is not None:
            ranking = [m[0] if len(m) == 1 else list(m) for m in given[0].ranking]
            lines.append({"group": group, "ranking": ranking})
            continue
        kept, left_out = majority_pairs(votes_of(given)[group])
        lines += [{"group": group, "ranking": list(pair)} for pair in kept]
        circles += left_out
    path = folder / PREFERENCES
    write_json_lines(path, lines)
    said = f"{len(rankings):,} groups ranked"
    if circles:
        said += f", {circles:,} pairs of images left out whose majorities go round in a circle"
    return Written(path=path, rows=len(rankings), said=said)


def majority_pairs(
    votes: Mapping[tuple[int, int], Votes],
) -> tuple[list[tuple[int, int]], int]:
    """Pairs of a group that most people decide alike, without those that would close a circle.

    Args:
        votes: of two images each.

    Returns:
        (preferred, other) in the order of their majorities, largest first; and how many were left
        out.
    """
    wanted = []
    for (one, other), of in votes.items():
        if of.first != of.second:
            pair = (one, other) if of.first > of.second else (other, one)
            wanted.append((-abs(of.first - of.second), pair))
    kept: list[tuple[int, int]] = []
    for _, pair in sorted(wanted):
        if not _goes_round([*kept, pair]):
            kept.append(pair)
    return kept, len(wanted) - len(kept)


def _goes_round(pairs: Sequence[tuple[int, int]]) -> bool:
    order: TopologicalSorter[int] = TopologicalSorter()
    for better, worse in pairs:
        order.add(worse, better)
    try:
        order.prepare()
    except CycleError:
        return True
    return False
