"""A pair judge as a scorer: what an image wins against the others of its prompt.

A judge says of two images which is preferred, and gives none a score of its own. Within a prompt
the mean probability with which an image is preferred to the others stands for one; of two images
its difference from a half is the judge's own word. Every pair is shown in both orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.pair_judges.base import AbstractPairJudge, every_pair, in_both_orders, win_rates
from diffalign.scorers.images import AbstractImageScorer


@dataclass(frozen=True, kw_only=True)
class Pairwise(AbstractImageScorer):
    """Mean probability of being preferred to the other images of the prompt, 0 to 1."""

    compares: ClassVar[bool] = True

    judge: AbstractPairJudge
    """Who compares two images: `kind: vlm`, a vision-language model; `kind: trained`, a reward
    model of your own. N images of a prompt are N (N - 1) questions: every pair, in both orders."""

    @property
    def fingerprint(self) -> str:
        return f"pairwise-{self.judge.fingerprint}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores of images among those of the same prompt, [n]; NaN for one without another."""
        scores = torch.full((len(images),), math.nan)
        for prompt in dict.fromkeys(prompts):
            places = [i for i, each in enumerate(prompts) if each == prompt]
            pairs = every_pair(len(places))
            if not pairs:
                continue
            a, b = ([images[places[pair[side]]] for pair in pairs] for side in (0, 1))
            judged = in_both_orders(self.judge, a, b, [prompt] * len(pairs))
            won = win_rates(len(places), pairs, judged.preference.tolist())
            scores[places] = torch.tensor([math.nan if each is None else each for each in won])
        return scores

    def to(self, device: torch.device | str) -> Pairwise:
        self.judge.to(device)
        return self
