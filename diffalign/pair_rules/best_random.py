"""The best image of a prompt against any other one.

PF-PPO (Shen and Zhang 2024, arXiv:2409.06957) compares it with best against worst: a reward model
that is right about the best and wrong about the worst is served better by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.pair_rules.base import AbstractPairRule, Pair, ScoredGroup, Uniform, decided


@dataclass(frozen=True, kw_only=True)
class BestRandom(AbstractPairRule):
    """One pair a prompt, of the highest score and one of the others, all equally probable."""

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        best, *others = group.ranked
        return decided(group, [(best, others[int(uniform() * len(others))])])

    def describe(self) -> str:
        return "the best image of each prompt against a random one of the others"
