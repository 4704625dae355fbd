"""What the figures of a run say of its health: rules on a small record, each a pure function.

A verdict says what happens, what harm that does, and what to change. Rules read means over the
latest logging intervals, together `LEAST_SAMPLES` samples or more, never a single interval.
Thresholds are those that tell the sound runs of the playground from the harmful ones
(docs/health.md has the figures of both, docs/log.md how they were found).

Sources: Razin et al. 2024, arXiv:2410.08847 (likelihood displacement); Yuan et al. 2024,
arXiv:2410.13828 (gradient entanglement); Rafailov et al. 2024, arXiv:2406.02900 (over-optimisation
of implicit rewards); Yan et al. 2024, arXiv:2406.07327 (the rejected side falls fastest); Gao et
al. 2022, arXiv:2210.10760 (over-optimisation of reward models); Shi et al. 2024, arXiv:2410.11677
(entropy and mass of the most probable tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffalign.training.figures import SATURATED
from diffalign.training.health_record import Record, Row, samples_of


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


CHOSEN_ERROR = 2.0
"""Chosen error over the reference's from which the chosen images are lost."""
FAR_OFF = 0.02
"""Share of pairs ranked the wrong way by a logit beyond 4 from which steps are too long."""
CHOSEN_FALL = 0.015
"""Nats per token by which chosen responses have to fall below their best."""
CHOSEN_FALL_SHARE = 0.25
"""Share of their best gain that they have to lose."""
DISPLACED = 0.25
"""Share of pairs that are told apart although their chosen response became less probable."""
FLATTER = 1.5
"""Entropy of the most probable tokens over that of the first intervals."""
OTHER_LENGTH = 1.5
"""Length of sampled responses over that of the first intervals, or the other way round."""
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
REWARD_RISE = 0.25
"""Rise of the trained score, in standard deviations of a round, next to which the fall of another
one is named."""
WATCHED = "round/watched/"
"""Prefix of the figures of scorers that are watched, and nothing is trained on."""
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


def displaced(record: Record) -> Verdict | None:
    """Many pairs are told apart by a rejected response that falls faster than the chosen one."""
    share, fell = record.recent("displaced"), record.recent("fell/chosen")
    if share is None or fell is None or share < DISPLACED:
        return None
    return Verdict(
        "displaced",
        f"{share:.0%} of the pairs are told apart although their chosen response became less "
        f"probable ({fell:.0%} of the chosen ones did): what both sides share is unlearnt, and the "
        f"mean over all pairs may not show it yet (likelihood displacement). Raise objective.beta, "
        f"add a term `anchor` or `sft`, or lower optimizer.lr.",
        {"displaced": share, "fell_chosen": fell},
        lower_rate=True,
    )


def flattens(record: Record) -> Verdict | None:
    """The policy becomes less sure of its words: what it writes next is spread over more tokens."""
    now, first = record.recent("top_entropy"), record.first.get("top_entropy", 0.0)
    mass = record.recent("top_mass")
    if now is None or mass is None or first <= 0 or now < FLATTER * first:
        return None
    return Verdict(
        "flattens",
        f"the entropy of the ten most probable tokens is {now / first:.1f} times that of the first "
        f"intervals, and they hold {mass:.1%} of the probability: the model loses its sureness of "
        f"words that nobody asked it to unlearn, and falls apart where it samples. Lower "
        f"optimizer.lr to a third, or raise objective.beta.",
        {"top_entropy": now, "top_entropy_first": first, "top_mass": mass},
        lower_rate=True,
    )


def length_drifts(record: Record) -> Verdict | None:
    """What the policy samples becomes much longer or shorter, round by round."""
    if not record.rounds:
        return None  # lengths of a data set are its own
    for name, first in record.first.items():
        now = record.recent(name) if name.startswith("tokens/") else None
        if now is None or first <= 0 or max(now / first, first / max(now, 1e-9)) < OTHER_LENGTH:
            continue
        return Verdict(
            "length_drifts",
            f"sampled responses have {now:.0f} tokens where they had {first:.0f}: a reward that "
            f"counts words, or mistakes alone, is met by length. Look at what is sampled; take "
            f"a reward that length does not change, or for losses of pairs "
            f"likelihood.reduction=mean.",
            {name: now, f"{name}_first": first},
            lower_rate=False,
        )
    return None


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
        watched = name.startswith(WATCHED)
        if watched or not name.endswith("_mean") or len(means) < len(record.rounds):
            continue
        best = max(range(len(means)), key=means.__getitem__)
        spread = record.rounds[best].get(f"{name.removesuffix('_mean')}_std", 0.0)
        fall = means[best] - means[-1]
        chance = REWARD_CHANCE * spread * math.sqrt(1 / scored[best] + 1 / scored[-1])
        if spread > 0 and fall > max(REWARD_FALL * spread, chance):
            scorer = _scorer(name)
            return Verdict(
                "reward_fell",
                f"the mean score by {scorer} fell from {means[best]:.3g} in round {best} to "
                f"{means[-1]:.3g} in round {len(means) - 1}: the policy gets worse at what it is "
                f"trained for. Use a checkpoint of round {best}, and lower optimizer.lr.",
                {name: means[-1], f"{name}_best": means[best]},
                lower_rate=True,
            )
    return None


def reward_hacked(record: Record) -> Verdict | None:
    """The score that rounds are compared by rises while a watched one falls, on the same images."""
    if len(record.rounds) < 2:
        return None
    means = [name for name in record.rounds[-1] if name.endswith("_mean")]
    for trained in (name for name in means if not name.startswith(WATCHED)):
        for other in (name for name in means if name.startswith(WATCHED)):
            rows = [row for row in record.rounds if trained in row and other in row]
            best = max(rows, key=lambda row: row[other])
            rise, fall = _change(trained, best, rows[-1]), _change(other, best, rows[-1])
            if rise is None or fall is None or rise < REWARD_RISE or fall > -REWARD_FALL:
                continue
            start, end = record.rounds.index(best), record.rounds.index(rows[-1])
            scorer, judge = _scorer(trained), _scorer(other)
            trains = "round/scored" in best  # SePPO trains on no score
            by, unlike = (", which is trained on,", ", which is not,") if trains else ("", "")
            return Verdict(
                "reward_hacked",
                f"the mean score by {scorer}{by} rose from {best[trained]:.3g} "
                f"in round {start} to {rows[-1][trained]:.3g} in round {end}, and that by {judge}"
                f"{unlike} fell from {best[other]:.3g} to {rows[-1][other]:.3g}: images are "
                f"made for the one at the cost of the other (reward hacking). It is harm where "
                f"{judge} measures something that you want: look at grid.png of both rounds. Then "
                f"use a checkpoint of round {start}, and raise objective.beta, lower optimizer.lr, "
                f"or train on {judge} as well (rollouts.scorers).",
                {
                    trained: rows[-1][trained],
                    f"{trained}_before": best[trained],
                    other: rows[-1][other],
                    f"{other}_before": best[other],
                },
                lower_rate=True,
            )
    return None


def _change(name: str, before: Row, after: Row) -> float | None:
    """Change of a round's mean score, in standard deviations of the round before; None where it may
    be chance."""
    spread = before.get(f"{name.removesuffix('_mean')}_std", 0.0)
    counts = [row.get("round/images", row.get("round/scored", 0.0)) for row in (before, after)]
    if spread <= 0 or min(counts) < 1:
        return None
    change = (after[name] - before[name]) / spread
    chance = REWARD_CHANCE * math.sqrt(1 / counts[0] + 1 / counts[1])
    return change if abs(change) > chance else None


def _scorer(name: str) -> str:
    """The scorer of a figure; SPO has one, whose figures do not name it."""
    found = name.removeprefix(WATCHED).removeprefix("round/").removesuffix("_mean")
    return "rollouts.scorer" if found in ("score", "candidate_score") else found


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
    displaced,
    flattens,
    length_drifts,
    beyond_clip,
    reward_fell,
    reward_hacked,
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
    if share * samples_of(record.latest) < LEAST_LONGER:
        return ""
    return (
        f" Chosen responses that are shorter are preferred in {shorter:.0%} of their pairs, "
        f"longer ones in {longer:.0%}: length is part of what is learnt."
    )


def _of(term: str) -> str:
    return f" of the term {term}" if term else ""
