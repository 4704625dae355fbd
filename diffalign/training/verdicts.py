"""What the figures of a run say of its health: rules on a small record, each a pure function.

A verdict says what happens, what harm that does, and what to change. Rules read means over the
latest logging intervals, together `LEAST_SAMPLES` samples or more, never a single interval.
Thresholds are those that tell the sound runs of the playground from the harmful ones
(docs/health.md has the figures of both, docs/log.md how they were found).

Sources: Razin et al. 2024, arXiv:2410.08847 (likelihood displacement); Yuan et al. 2024,
arXiv:2410.13828 (gradient entanglement); Rafailov et al. 2024, arXiv:2406.02900 (over-optimisation
of implicit rewards); Yan et al. 2024, arXiv:2406.07327 (the rejected side falls fastest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.objectives.base import Measure
from diffalign.training.figures import SATURATED

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


@dataclass(frozen=True)
class Verdict:
    """What a rule found."""

    name: str
    sentence: str
    """What happens, what harm it does, and what to change."""
    figures: Row
    """What it rests on."""
    lower_rate: bool
    """Whether a lower learning rate is a remedy."""


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
        while len(latest) > LEAST_INTERVALS and _samples(latest[1:]) >= LEAST_SAMPLES:
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
        return len(self.latest) >= LEAST_INTERVALS and _samples(self.latest) >= LEAST_SAMPLES

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


def _samples(rows: Sequence[Row]) -> float:
    """Samples of some intervals in a row, of which each tells how many there were up to its end."""
    if len(rows) < 2:
        return 0.0
    each = rows[-1]["samples"] - rows[-2]["samples"]
    return rows[-1]["samples"] - rows[0]["samples"] + each


CHOSEN_ERROR = 2.0
"""Chosen error over the reference's from which the chosen images are lost."""
FAR_OFF = 0.02
"""Share of pairs ranked the wrong way by a logit beyond 4 from which steps are too long."""
CHOSEN_FALL = 0.015
"""Nats per token by which chosen responses have to fall below their best."""
CHOSEN_FALL_SHARE = 0.25
"""Share of their best gain that they have to lose."""
BY_LENGTH = 0.2
"""Difference of accuracies at which length is named."""
LEAST_LONGER = 20
"""Pairs whose chosen side is the longer one that such a difference has to rest on."""
CLIP_RANGES = 2.0
"""Mean magnitude of log-ratios over the clip range from which a run no longer steers itself, where
it is so in every one of the latest intervals: a reference that is renewed brings them back."""
REWARD_FALL = 0.5
"""Fall of a round's mean score below the best one's, in standard deviations of that round."""
REWARD_CHANCE = 4.0
"""The same in standard errors, for rounds of few images, of which the best is best by luck."""
TIED = 0.9
"""Share of pairs without a preference from which a round teaches next to nothing."""
HELD_OUT_LOSS = 1.05
"""Held-out loss over that before the first step, in two evaluations in a row."""


def rate_too_high(record: Record) -> Verdict | None:
    """Both errors run away, and pairs that are ranked the wrong way are so by far."""
    grown = error_growth(record)
    far = max((value for _, value in record.terms("far_off")), default=0.0)
    if grown is None or grown < CHOSEN_ERROR or far < FAR_OFF:
        return None
    return Verdict(
        "rate_too_high",
        f"the error of chosen images is {grown:.1f} times the reference's, and {far:.0%} of the "
        f"pairs are ranked the wrong way by a logit beyond {SATURATED:g}. Steps are too long: the "
        f"model loses what it could, also of images that are preferred. Lower optimizer.lr to a "
        f"third, and use a checkpoint from before this one.",
        {"chosen_error_growth": grown, "far_off": far},
        lower_rate=True,
    )


def chosen_lost(record: Record) -> Verdict | None:
    """The chosen side's error runs away while its lead over the rejected side grows."""
    grown = error_growth(record)
    if grown is None or grown < CHOSEN_ERROR or rate_too_high(record):
        return None
    cosine = record.recent("cosine_of_sides")
    return Verdict(
        "chosen_lost",
        f"the error of chosen images is {grown:.1f} times the reference's: the margin grows "
        f"because rejected images get worse faster (likelihood displacement), and what is "
        f"generated gets worse with them. Raise objective.beta, lower optimizer.lr"
        + (
            ""
            if cosine is None
            else f", or set likelihood.safeguard=0.9 (the two sides' residuals "
            f"have a cosine of {cosine:.2f})"
        )
        + ".",
        {"chosen_error_growth": grown},
        lower_rate=True,
    )


def chosen_falls(record: Record) -> Verdict | None:
    """Chosen responses lose what they had gained, while rejected ones go on falling."""
    chosen, rejected = record.gain("chosen"), record.gain("rejected")
    if chosen is None or rejected is None or not record.best:
        return None
    best = record.best["chosen"]
    fall = best - chosen
    if fall < max(CHOSEN_FALL, CHOSEN_FALL_SHARE * best) or rejected > -fall:
        return None
    return Verdict(
        "chosen_falls",
        f"chosen responses are {fall:.3f} nats per token less probable than at step "
        f"{record.best['step']:.0f}, and rejected ones fall {-rejected / fall:.0f} times as far: "
        f"what both share is unlearnt too, and responses become shorter and poorer."
        f"{_by_length(record)} Raise objective.beta, add a term `anchor` or `sft`, or lower "
        f"optimizer.lr; and measure recall and words of a checkpoint near that step "
        f"(docs/evaluate-vlm.md).",
        {"chosen_fall": fall, "best_at": record.best["step"], "rejected_gain": rejected},
        lower_rate=True,
    )


def beyond_clip(record: Record) -> Verdict | None:
    """Log-ratios are far beyond the clip range, where nothing pulls them back."""
    if record.clip is None:
        return None
    for term, size in record.terms("abs_log_ratio"):
        name = f"{term}/abs_log_ratio" if term else "abs_log_ratio"
        if min(row[name] for row in record.latest) >= CLIP_RANGES * record.clip:
            return Verdict(
                "beyond_clip",
                f"log-ratios{_of(term)} keep a mean magnitude of {size:.2g}, and the loss has no "
                f"gradient beyond {record.clip:g} (objective.clip): nothing pulls the policy back "
                f"towards its reference, and it falls apart in a few rounds. Set "
                f"rollouts.reference=latest, and lower optimizer.lr to a third.",
                {"abs_log_ratio": size, "clip": record.clip},
                lower_rate=True,
            )
    return None


def reward_fell(record: Record) -> Verdict | None:
    """What the policy samples is scored worse than what it sampled some rounds ago."""
    scored = [row.get("round/scored", 0.0) for row in record.rounds]
    if len(scored) < 2 or min(scored) < 1:  # or sampled by an earlier policy, as for SePPO
        return None
    for name in record.rounds[-1]:
        means = [row[name] for row in record.rounds if name in row]
        if not name.endswith("_mean") or len(means) < len(record.rounds):
            continue
        best = max(range(len(means)), key=means.__getitem__)
        spread = record.rounds[best].get(f"{name.removesuffix('_mean')}_std", 0.0)
        fall = means[best] - means[-1]
        chance = REWARD_CHANCE * spread * math.sqrt(1 / scored[best] + 1 / scored[-1])
        if spread > 0 and fall > max(REWARD_FALL * spread, chance):
            scorer = name.removeprefix("round/").removesuffix("_mean")
            return Verdict(
                "reward_fell",
                f"the mean score by {scorer} fell from {means[best]:.3g} in round {best} to "
                f"{means[-1]:.3g} in round {len(means) - 1}: the policy gets worse at what it is "
                f"trained for. Use a checkpoint of round {best}, and lower optimizer.lr.",
                {name: means[-1], f"{name}_best": means[best]},
                lower_rate=True,
            )
    return None


def all_tied(record: Record) -> Verdict | None:
    """Scores hardly tell the samples of a round apart."""
    tied = record.rounds[-1].get("round/tied_share") if record.rounds else None
    if tied is None or tied < TIED:
        return None
    return Verdict(
        "all_tied",
        f"{tied:.0%} of the round's pairs have equal scores, so hardly anything is learnt for the "
        f"cost of sampling. Take a scorer of finer steps, more images a prompt, or harder prompts.",
        {"tied_share": tied},
        lower_rate=False,
    )


def held_out_worse(record: Record) -> Verdict | None:
    """Pairs that are not trained on are ranked with more loss than before the first step."""
    losses = [(row["step"], row["held_out/loss"]) for row in record.held_out]
    if len(losses) < 3 or losses[0][0] != 0 or losses[0][1] <= 0:
        return None
    start, latest = losses[0][1], losses[-2:]
    if min(loss for _, loss in latest) < HELD_OUT_LOSS * start:
        return None
    step, least = min(losses, key=lambda at: at[1])
    learnt = f"its least was {least:.3g} at step {step}" if step else "it never fell"
    accuracy = record.held_out[-1].get("held_out/accuracy")
    ranked = "" if accuracy is None else f" ({accuracy:.0%} of them are ranked right)"
    return Verdict(
        "held_out_worse",
        f"the loss on held-out pairs is {latest[-1][1]:.3g}, above the {start:.3g} before the "
        f"first step{ranked}; {learnt}. What is learnt now is the training pairs. "
        f"Use a checkpoint near step {step}, train for fewer steps, or lower "
        f"optimizer.lr.",
        {"held_out_loss": latest[-1][1], "least": least, "least_at": step},
        lower_rate=True,
    )


RULES: tuple[Callable[[Record], Verdict | None], ...] = (
    rate_too_high,
    chosen_lost,
    chosen_falls,
    beyond_clip,
    reward_fell,
    all_tied,
    held_out_worse,
)


def verdicts_on(record: Record) -> list[Verdict]:
    """All that the rules find; nothing while the latest figures are too few."""
    if not record.is_enough:
        return []
    return [found for rule in RULES if (found := rule(record)) is not None]


def error_growth(record: Record) -> float | None:
    """Chosen error of a denoiser over that of the reference on the same samples; without a
    reference, over that of the first intervals."""
    error, drift = record.recent("error/chosen"), record.recent("drift/chosen")
    if error is None:
        return None
    before = record.first.get("error/chosen", 0.0) if drift is None else error + 2 * drift
    return error / before if before > 0 else None


def _by_length(record: Record) -> str:
    """A sentence where the shorter of two responses is preferred whether it is chosen or not."""
    shorter, longer = (record.recent(f"accuracy/chosen_{side}") for side in ("shorter", "longer"))
    share = record.recent("chosen_longer")
    if shorter is None or longer is None or share is None or shorter - longer < BY_LENGTH:
        return ""
    if share * _samples(record.latest) < LEAST_LONGER:
        return ""
    return (
        f" Chosen responses that are shorter are preferred in {shorter:.0%} of their pairs, "
        f"longer ones in {longer:.0%}: length is part of what is learnt."
    )


def _of(term: str) -> str:
    return f" of the term {term}" if term else ""
