"""Relative preference optimisation: each chosen image is preferred to the rejected ones of other
prompts too, the more so the more the prompts are alike.

Of B pairs, all B x B margins of a chosen and a rejected side are compared, and the weights of a row
are the softmax of the cosines between what its sample and the others are about, divided by a
temperature. What samples are about is measured by the likelihood (`likelihood.embedding`).

No code for images is public, and the formula can be read in two ways. `weight: outside` weighs the
losses, sum_j w_ij * -log sigmoid(beta * margin_ij): with weights of the own sample alone it is DPO,
which is why it is the default. `weight: inside` weighs the margins, as the trainer of the same
authors for language models does, and takes the mean over j: a comparison of little weight then
costs log 2 and not 0, so that the loss of a large batch lies near log 2 whatever is learnt.

The comparisons are those within a micro-batch of one device: the loss depends on
`training.samples_per_device`, and with 1 it is DPO.

Source: Gu et al. 2024, arXiv:2406.06382 (Diffusion-RPO); Yin et al. 2024, arXiv:2402.10958, for the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import normalize

from diffalign.objectives.base import AbstractObjective, LossOutput, Measured, Views
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, Beta, pair_metrics
from diffalign.ranges import MoreThan


def contrastive_weights(embedding: Tensor, *, temperature: float) -> Tensor:
    """How much each sample is compared with each other one.

    Args:
        embedding: what each is about, shape [B, width].
        temperature: above 0; towards 0 each is compared with the most similar alone, itself.

    Returns:
        Shape [B, B]; rows add up to 1.
    """
    directions = normalize(embedding.detach(), dim=1)
    return (directions @ directions.T / temperature).softmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class DiffusionRPO(AbstractObjective):
    """RPO over the chosen and rejected views of a micro-batch."""

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = True
    needs_measured: ClassVar[frozenset[Measured]] = frozenset({"embedding"})

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""
    temperature: Annotated[float, MoreThan(0)] = 0.5
    """Of the softmax over cosines: at 0.1 other prompts hardly count, at 1 nearly as much as the
    own one."""
    weight: Literal["outside", "inside"] = "outside"
    """What is weighed: losses, or margins."""

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"], views["rejected"]
        assert chosen.embedding is not None, "the run was checked"
        ratios = chosen.log_ratio, rejected.log_ratio
        weights = contrastive_weights(chosen.embedding, temperature=self.temperature)
        weights = weights.to(ratios[0].dtype)
        margins = ratios[0][:, None] - ratios[1][None, :]
        if self.weight == "outside":
            loss = (weights * dpo_loss(margins, beta=self.beta)).sum(dim=1)
        else:
            loss = dpo_loss(weights * margins, beta=self.beta).mean(dim=1)
        rewards = self.beta * ratios[0], self.beta * ratios[1]
        own = {"own_weight": weights.diagonal()}
        return LossOutput(loss, {**pair_metrics(*rewards), **own})

    def note(self) -> str:
        """What is compared."""
        return (
            f"chosen with all rejected images of a micro-batch, weights {self.weight} the "
            f"logarithm: the loss depends on training.samples_per_device"
        )
