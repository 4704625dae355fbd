"""The figures of a run on which verdicts rest: a record that grows row by row.

Rules read means over the latest logging intervals, together `LEAST_SAMPLES` samples or more, never
a single interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.objectives.base import Measure

Row = Mapping[str, float]
"""A row of `metrics.jsonl`."""

LEAST_INTERVALS = 3
LEAST_SAMPLES = 256
"""How much the latest figures are means of, in logging intervals and in samples."""


SHOWN = (
    ("accuracy", "accuracy", ".0%"),
    ("saturated", "logits beyond 4", ".0%"),
    ("drift/chosen", "chosen side against the reference", "+.2g"),
    ("drift/rejected", "rejected side", "+.2g"),
    ("cosine_of_sides", "cosine of the sides", ".2f"),
    ("clipped", "clipped", ".0%"),
)
"""Figure, label and format of what is said at the end of a sound run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The figures of a run as far as verdicts rest on them."""

    measure: Measure
    """Of the likelihood."""
    clip: float | None = None
    """Clip range of the objective, where it has one."""
    first: Row = field(default_factory=dict)
    """Means over the first intervals that are enough."""
    latest: tuple[Row, ...] = ()
    """The latest ones, oldest first: as few as reach `LEAST_INTERVALS` and `LEAST_SAMPLES`."""
    best: Row = field(default_factory=dict)
    """Where the chosen responses were most probable: `chosen`, in nats per token above the
    reference or above the first intervals, and `step`; empty for other measures."""
    held_out: tuple[Row, ...] = ()
    """All evaluations of held-out pairs, with `step`."""
    rounds: tuple[Row, ...] = ()
    """All rounds of an online run, with the `step` at which each is first told of."""

    def after(self, row: Row) -> Record:
        """The record with one more row."""
        record = self
        if evaluated := _part(row, "held_out/"):
            record = replace(record, held_out=(*record.held_out, evaluated))
        sampled = _part(row, "round/")
        if sampled and not (record.rounds and _same(sampled, record.rounds[-1])):
            record = replace(record, rounds=(*record.rounds, sampled))
        if "loss" not in row:
            return record
        latest = [*record.latest, row]
        while len(latest) > LEAST_INTERVALS and samples_of(latest[1:]) >= LEAST_SAMPLES:
            latest.pop(0)
        record = replace(record, latest=tuple(latest))
        if not record.first and record.is_enough:
            means = {name: record.recent(name) for name in row}
            known = {name: mean for name, mean in means.items() if mean is not None}
            record = replace(record, first=known)
        now = record.gain("chosen") if record.is_enough else None
        if now is not None and now > record.best.get("chosen", -math.inf):
            record = replace(record, best={"chosen": now, "step": row["step"]})
        return record

    def afresh(self) -> Record:
        """The record without its latest figures, once something was changed."""
        return replace(self, latest=())

    @property
    def is_fresh(self) -> bool:
        """Whether there are no latest figures."""
        return not self.latest

    @property
    def is_enough(self) -> bool:
        """Whether the latest figures are means of enough."""
        return len(self.latest) >= LEAST_INTERVALS and samples_of(self.latest) >= LEAST_SAMPLES

    def recent(self, name: str) -> float | None:
        """Mean of a figure over the latest intervals; None where one of them lacks it."""
        values = [row[name] for row in self.latest if name in row]
        return (
            math.fsum(values) / len(values) if values and len(values) == len(self.latest) else None
        )

    def terms(self, name: str) -> Iterator[tuple[str, float]]:
        """A figure of each term of the objective: term (empty for the only one), and its mean."""
        names = self.latest[-1] if self.latest else {}
        for full in names:
            term, _, last = full.rpartition("/")
            value = self.recent(full) if last == name else None
            if value is not None:
                yield term, value

    def gain(self, view: str) -> float | None:
        """How much more probable responses are than under the reference, or without one than in the
        first intervals, in nats per token; None for other measures."""
        drift, tokens = self.recent(f"drift/{view}"), self.recent(f"tokens/{view}")
        if self.measure != "token log-probability":
            return None
        if drift is not None:
            return drift if tokens is None else drift / tokens
        level, first = self.recent(f"log_prob/{view}"), self.first.get(f"log_prob/{view}")
        return None if level is None or first is None else level - first

    def describe(self) -> str:
        """What the latest figures are, for a run in which nothing harmful was found."""
        said = [
            f"{text} {value:{form}}"
            for name, text, form in SHOWN
            if (value := self.recent(name)) is not None
        ]
        return ", ".join(["nothing harmful was seen", *said])

    def as_tensors(self) -> dict[str, Tensor]:
        """All figures by name, for a checkpoint: float64, minus infinity where a row
        lacks one: unlike NaN it equals itself, as the checkpoints of two equal runs have to."""
        parts = {"first": (self.first,) if self.first else (), "latest": self.latest}
        parts |= {"best": (self.best,) if self.best else ()}
        parts |= {"held_out": self.held_out, "rounds": self.rounds}
        return {
            f"{part}:{name}": torch.tensor(
                [row.get(name, -math.inf) for row in rows], dtype=torch.float64
            )
            for part, rows in parts.items()
            for name in sorted({name for row in rows for name in row})
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, measure: Measure, clip: float | None
    ) -> Record:
        """What `as_tensors` gave, among other tensors; empty where there is nothing."""

        def rows(part: str) -> tuple[Row, ...]:
            columns = {
                name.partition(":")[2]: values.tolist()
                for name, values in tensors.items()
                if name.startswith(f"{part}:")
            }
            count = len(next(iter(columns.values()), []))
            return tuple(
                {name: of[i] for name, of in columns.items() if of[i] != -math.inf}
                for i in range(count)
            )

        first, best = rows("first"), rows("best")
        return cls(
            measure=measure,
            clip=clip,
            first=first[0] if first else {},
            best=best[0] if best else {},
            latest=rows("latest"),
            held_out=rows("held_out"),
            rounds=rows("rounds"),
        )


def _part(row: Row, prefix: str) -> Row:
    found = {name: value for name, value in row.items() if name.startswith(prefix)}
    return {"step": row["step"], **found} if found else {}


def _same(one: Row, other: Row) -> bool:
    return {**one, "step": 0} == {**other, "step": 0}


def samples_of(rows: Sequence[Row]) -> float:
    """Samples of some intervals in a row, of which each tells how many there were up to its end."""
    if len(rows) < 2:
        return 0.0
    each = rows[-1]["samples"] - rows[-2]["samples"]
    return rows[-1]["samples"] - rows[0]["samples"] + each
