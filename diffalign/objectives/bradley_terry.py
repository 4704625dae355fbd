"""The criterion of a preference model: its scores should predict which side was preferred.

The "likelihoods" of this objective are scores, and its labels are soft: a tie is half a preference
for either side. Each pair pays the divergence of the predicted preference from the label, so that
what is predicted as labelled costs 0, ties included.

Source: the step-aware preference model of Liang et al. 2024, arXiv:2406.04314, as in
trainer/criterions/spm_criterion.py of RockeyCoss/SPO, without the in-batch negatives that are off
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, Known, LossOutput, Measure, Part, Views


def bradley_terry_divergence(
    margin: Tensor, *, weight_chosen: Tensor, weight_rejected: Tensor
) -> Tensor:
    """Importance of a pair times the divergence of a predicted preference from its soft label.

    Args:
        margin: score of the chosen side minus that of the rejected side, shape [B].
        weight_chosen: importance times the probability that the chosen side is preferred, [B].
        weight_rejected: importance times the probability of the other side, [B].

    Returns:
        Shape [B], at least 0; 0 where sigmoid(margin) is the label, and where both weights are 0.
    """
    importance = weight_chosen + weight_rejected
    safe = importance.clamp(min=torch.finfo(importance.dtype).tiny)
    cross_entropy = -weight_chosen * logsigmoid(margin) - weight_rejected * logsigmoid(-margin)
    negative_entropy = sum(torch.xlogy(w, w / safe) for w in (weight_chosen, weight_rejected))
    return cross_entropy + negative_entropy


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(AbstractObjective):
    """Divergence of predicted from labelled preferences, over scores of two sides.

    `Likelihoods.policy` is a score. `Likelihoods.weight` is the importance of the pair times the
    probability that this side is preferred; without weights the chosen side is, and all pairs count
    alike.
    """

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    needs_reference: ClassVar[bool] = False
    reads: ClassVar[frozenset[Measure]] = frozenset({"score"})
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"preference", "weight"})
    must_know: ClassVar[Known] = "counts"

    def __call__(self, views: Views) -> LossOutput:
        """One loss per pair; its mean over all pairs of all ranks is the importance-weighted mean.

        A label of one half counts half in the accuracy and nothing in the margin.
        """
        chosen, rejected = views["chosen"], views["rejected"]
        margin = chosen.policy - rejected.policy
        weight_chosen = torch.ones_like(margin) if chosen.weight is None else chosen.weight
        weight_rejected = torch.zeros_like(margin) if rejected.weight is None else rejected.weight
        loss = bradley_terry_divergence(
            margin, weight_chosen=weight_chosen, weight_rejected=weight_rejected
        )
        agreed = margin.detach() * (weight_chosen - weight_rejected).sign()
        metrics = {"accuracy": (agreed.sign() + 1) / 2, "margin": agreed}
        totals = [view.totals for view in (chosen, rejected)]
        summed = [
            of.rows * default if view.weight is None else of.weight
            for of, view, default in zip(totals, (chosen, rejected), (1.0, 0.0), strict=True)
        ]
        mean_importance = torch.stack(summed).sum() / totals[0].rows
        smallest = torch.finfo(mean_importance.dtype).tiny
        return LossOutput(loss / mean_importance.clamp(min=smallest), metrics)
