"""Policy gradients on sampled responses, token by token: GRPO and its relatives.

A response that did better than the others of its prompt (`Likelihoods.advantage` A above 0) becomes
more likely, one that did worse less. Where a step is not the first after sampling, each token, or
each response, counts by the ratio of its probability to what it was when it was sampled. With r
that ratio, a token's loss is

    grpo, bnpo, dapo, dr_grpo, luspo   -min(r A, clip(r, 1 - clip, 1 + clip_high) A)
    cispo                              -min(r, cap) A log p, the ratio without gradient
    sapo                               -(4 / t) sigmoid(t (r - 1)) A, t by the sign of A
    vespo                              -r^k exp(l (1 - r)) A log p, r of the whole response, k and l
                                       by the sign of A, without gradient

and what a step's loss is the mean of differs too: responses, each by the mean over its tokens
(grpo, sapo); all tokens of the step (bnpo, dapo, cispo, vespo: the first two are the same here,
since no loss depends on how a step is cut); responses by the sum over their tokens, which is
divided by `max_length` (dr_grpo) or not (luspo). Straight after sampling all ratios are 1: the loss
is then minus the mean advantage, often 0, and its gradient is not.

Sources: Shao et al. 2024, arXiv:2402.03300 (GRPO, and the divergence); Yu et al. 2025,
arXiv:2503.14476 (DAPO); Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Zheng et al. 2025,
arXiv:2507.18071 (GSPO: ratios of sequences); MiniMax 2025, arXiv:2506.13585 (CISPO); all of them in
the forms of TRL 1.16, which names them so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    Known,
    Likelihoods,
    LossOutput,
    Measure,
    Measured,
    Part,
    TokenLikelihoods,
    Views,
)
from diffalign.ranges import AtLeast, Between, MoreThan

Form = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]
Importance = Literal["token", "sequence"]

CLIPPED: frozenset[Form] = frozenset({"grpo", "bnpo", "dapo", "dr_grpo", "luspo"})
BY_TOKENS: frozenset[Form] = frozenset({"bnpo", "dapo", "cispo", "vespo"})
FORMS_OF: Mapping[str, frozenset[Form]] = {
    "clip_high": CLIPPED,
    "delta": CLIPPED,
    "cap": frozenset({"cispo"}),
    "temperature": frozenset({"sapo"}),
    "temperature_negative": frozenset({"sapo"}),
    "max_length": frozenset({"dr_grpo"}),
}
"""Settings of some forms alone."""
VESPO_POSITIVE, VESPO_NEGATIVE = (2.0, 3.0), (3.0, 2.0)
"""k and l of `vespo`, as in TRL."""
LARGEST = 20.0
"""Magnitude of a log-ratio beyond which it is held: a ratio of half a billion says nothing."""


def bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio whose exponential is finite; no gradient where it was held."""
    return log_ratio.clamp(-LARGEST, LARGEST)


def clipped_loss(
    ratio: Tensor, advantage: Tensor, *, low: float, high: float, delta: float | None = None
) -> Tensor:
    """Minus the smaller of the plain and the clipped gain.

    Args:
        ratio: of probabilities, now and when it was sampled.
        advantage: of the same shape, or one that goes with it.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        delta: what the plain ratio is held at from above: without it, nothing bounds the loss
            where the advantage is below 0.

    Returns:
        Elementwise. Where a ratio has moved too far the right way there is no gradient.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    plain = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(plain * advantage, clipped * advantage)


def soft_loss(ratio: Tensor, advantage: Tensor, *, positive: float, negative: float) -> Tensor:
    """Minus the gain through a sigmoid whose slope at a ratio of 1 is 1 (SAPO), elementwise.

    Args:
        ratio, advantage: as in `clipped_loss`.
        positive, negative: how fast it saturates, by the sign of the advantage.
    """
    temperature = torch.where(advantage > 0, ratio.new_tensor(positive), ratio.new_tensor(negative))
    return -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantage


def sequence_weight(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Tensor:
    """How much a response counts whose policy has moved (VESPO): r^k exp(l (1 - r)), 1 at r = 1.

    Args:
        log_ratio: of whole responses, the sum over their tokens, [n].
        advantage: [n].
        positive, negative: k and l, by the sign of the advantage.

    Returns:
        Shape [n], without gradient.
    """
    moved = log_ratio.detach().clamp(math.log(1e-8), LARGEST)
    power, rate = (
        torch.where(advantage >= 0, moved.new_tensor(up), moved.new_tensor(down))
        for up, down in zip(positive, negative, strict=True)
    )
    return (power * moved + rate * (1 - moved.exp())).exp()


def token_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each sampled token, elementwise, at least 0.

    exp(d) - d - 1 with d = reference - policy (Schulman's k3).
    """
    apart = bounded(reference - policy)
    return apart.exp() - apart - 1


@dataclass(frozen=True, kw_only=True)
class GRPO(AbstractObjective):
    """A policy gradient over the view `sampled`: one sampled response a row, with its advantage."""

    views: ClassVar[frozenset[str]] = frozenset({"sampled"})
    reads: ClassVar[frozenset[Measure]] = TOKENS
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_measured: ClassVar[frozenset[Measured]] = frozenset({"tokens"})

    form: Form = "dapo"
    """Which loss a token has, and what a step is the mean of, by the names that TRL has for them
    (`loss_type`); `dapo` is its default."""
    importance: Importance = "token"
    """Whether a ratio is that of a token, or the geometric mean over the response (GSPO)."""
    clip: Annotated[float, Between(0, 1, without=[0])] = 0.2
    """How far a ratio may fall below 1 before it stops to count; GSPO has 3e-4."""
    clip_high: Annotated[float, MoreThan(0)] | None = None
    """How far it may rise above 1; null takes `clip`. DAPO's paper has 0.28, GSPO's 4e-4."""
    delta: Annotated[float, MoreThan(1)] | None = None
    """What ratios are held at from above where the advantage is below 0 (INTELLECT-2); null for
    nothing."""
    cap: Annotated[float, MoreThan(0)] | None = None
    """Of `cispo`: what ratios are held at from above; null for 5. TRL calls it epsilon_high; it is
    the ratio itself, and not how far that may rise above 1."""
    temperature: Annotated[float, MoreThan(0)] | None = None
    """Of `sapo`, where the advantage is above 0; null for 1."""
    temperature_negative: Annotated[float, MoreThan(0)] | None = None
    """Of `sapo`, elsewhere; null for 1.05."""
    max_length: Annotated[int, AtLeast(1)] | None = None
    """Of `dr_grpo`: the most tokens that a response may have, which sums are divided by."""
    beta: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the divergence from the reference at each token; at 0 there is no reference. 0.04
    in the paper, 0 in TRL."""
    weighted_kl: bool = True
    """Multiply the divergence by the ratio, as TRL does since version 1: straight after sampling
    its gradient is then that of the divergence itself, and without it that of another one."""
    off_policy: Annotated[float, MoreThan(0)] | None = None
    """Leave out responses that did worse than the others and of which the policy has already moved
    away by so much, in nats a token (DeepSeek-V3.2); null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, forms in FORMS_OF.items():
            value = getattr(self, name)
            if value is not None and self.form not in forms:
                raise ValueError(
                    f"form is {self.form}, which has no {name}, and {name} is {value}: leave it "
                    f"out, or take {' or '.join(sorted(forms))}"
                )
        if self.form == "dr_grpo" and self.max_length is None:
            raise ValueError(
                "form is dr_grpo, which divides by the most tokens that a response may have: set "
                "max_length to the number that rollouts sample at most"
            )
        if self.form == "vespo" and self.importance == "sequence":
            raise ValueError(
                "form is vespo, which weighs whole responses whatever importance is: leave "
                "importance out"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the policy is held near it."""
        return self.beta > 0

    @property
    def must_know(self) -> Known:
        """How many tokens a step has, where it is the mean over all of them."""
        return "counts" if self.form in BY_TOKENS else "nothing"

    def __call__(self, views: Views) -> LossOutput:
        view = views["sampled"]
        tokens, advantage = view.tokens, view.advantage
        assert tokens is not None and advantage is not None, "the run was checked"
        ratio = bounded(self._log_ratio(tokens)).exp()
        of_token = advantage[:, None]
        loss = self._loss(tokens, ratio, of_token)
        figures = {"ratio": tokens.mean(ratio), "advantage": advantage}
        if self.form in CLIPPED:
            low, high = ratio < 1 - self.clip, ratio > 1 + self._high
            idle = (low & (of_token < 0)) | (high & (of_token > 0))
            figures["clipped"] = tokens.mean(idle.to(ratio.dtype))
        if self.off_policy is not None:
            kept = (advantage >= 0) | (-tokens.mean(tokens.log_ratio) <= self.off_policy)
            loss = loss * kept[:, None]
            figures["left_out"] = 1 - kept.to(ratio.dtype)
        if self.beta:
            assert tokens.reference is not None, "the run was checked"
            divergence = token_kl(tokens.policy, tokens.reference)
            figures["kl"] = tokens.mean(divergence)
            loss = loss + self.beta * (divergence * ratio if self.weighted_kl else divergence)
        figures = {name: values.detach() for name, values in figures.items()}
        return LossOutput(self._reduced(view, tokens, loss), figures)

    @property
    def _high(self) -> float:
        return self.clip if self.clip_high is None else self.clip_high

    def _log_ratio(self, tokens: TokenLikelihoods) -> Tensor:
        """[n, T], or [n, 1] where it is that of the response."""
        if self.importance == "token":
            return tokens.log_ratio
        return tokens.mean(tokens.log_ratio)[:, None]

    def _loss(self, tokens: TokenLikelihoods, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Of each token, [n, T] or [n, 1], before any divergence."""
        match self.form:
            case "cispo":
                return -ratio.detach().clamp(max=self.cap or 5.0) * advantage * tokens.policy
            case "sapo":
                return soft_loss(
                    ratio,
                    advantage,
                    positive=self.temperature or 1.0,
                    negative=self.temperature_negative or 1.05,
                )
            case "vespo":
                moved = (bounded(tokens.log_ratio) * tokens.weights).sum(dim=1)
                weight = sequence_weight(
                    moved, advantage[:, 0], positive=VESPO_POSITIVE, negative=VESPO_NEGATIVE
                )
                return -weight[:, None] * advantage * tokens.policy
            case _:
                return clipped_loss(
                    ratio, advantage, low=self.clip, high=self._high, delta=self.delta
                )

    def _reduced(self, view: Likelihoods, tokens: TokenLikelihoods, loss: Tensor) -> Tensor:
        """One loss a response, [n], whose mean over the step is the one that the form has."""
        if self.form in ("grpo", "sapo"):
            return tokens.mean(loss)
        summed = (loss * tokens.weights).sum(dim=1)
        if self.form in BY_TOKENS:
            totals = view.totals
            assert view.length is not None, "a likelihood that gives tokens counts them"
            total = torch.where(totals.tokens > 0, totals.tokens, 1)
            return summed * (len(summed) * totals.micro_batches / total)
        return summed if self.max_length is None else summed / self.max_length

    def note(self) -> str:
        """Why the loss of a healthy run is near 0."""
        return (
            f"{self.form}: straight after sampling the loss is minus the mean advantage, whatever "
            f"is learnt; watch the rewards of the rounds, ratio and clipped"
        )
