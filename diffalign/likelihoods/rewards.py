"""What a reward model says of images as they are; `response_rewards` has the same of responses.

A score takes the place of a log-likelihood: the objective bradley_terry compares the scores of two
views. Labels, soft ones among them, are the data set's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from diffalign.data.batches import ImageBatch, TokenBatch
from diffalign.imaging.image_files import to_images
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.likelihoods.scores import side_weights
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.preference.rewards import AbstractRewardModel, RewardModel
from diffalign.objectives.base import Measure

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class SeenViews:
    """V views of B samples as V * B rows, as the encoder takes them."""

    views: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    users: Tensor | None
    """Int64 [V * B], numbers of who gave each verdict; None where all are one."""
    weights: Mapping[str, Tensor]
    """View -> importance of the pair times the probability that this side is preferred, [B]."""


@dataclass(frozen=True, kw_only=True)
class AbstractRewards(AbstractLikelihood[RewardModel, Batch, SeenViews]):
    """Scores of a reward model, a difference of which is a log-odds."""

    measures: ClassVar[Measure] = "score"

    def evaluate(self, model: RewardModel, prepared: SeenViews) -> dict[str, Tensor]:
        rows = model.outputs(prepared.inputs, prepared.users).chunk(len(prepared.views))
        found = dict(zip(prepared.views, rows, strict=True))
        if model.head.compares:
            sides = model.head.sides(found["chosen"], found["rejected"])
            return dict(zip(("chosen", "rejected"), sides, strict=True))
        return found

    def row_metadata(self, prepared: SeenViews) -> dict[str, dict[str, Tensor]]:
        """How much each side's win counts, as `weight`."""
        return {view: {"weight": weight} for view, weight in prepared.weights.items()}


@dataclass(frozen=True, kw_only=True)
class Rewards(AbstractRewards[ImageBatch]):
    """Scores of images by a reward model, a difference of which is a log-odds."""

    batch_type: ClassVar[type] = ImageBatch
    needs_captions: ClassVar[bool] = True

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, AbstractRewardModel) or model.of_responses:
            raise ValueError(
                "rewards are those of a reward model of images: set model.kind to clip_reward or "
                "vlm_reward, and model.candidates to images"
            )

    @torch.no_grad()
    def prepare(self, model: RewardModel, batch: ImageBatch) -> SeenViews:
        """Read all views, in 8 bits as files hold them; they share the caption, dropped or not."""
        views = tuple(batch.images)
        images = torch.cat([batch.images[view] for view in views])
        users = model.head.rows_of(batch.users)
        return SeenViews(
            views=views,
            inputs=model.read(to_images(images), batch.captions * len(views)),
            users=None if users is None else send(users.repeat(len(views)), model.device),
            weights=weights_of(batch, model.device),
        )

    def describe(self) -> str:
        """One line for the start of a run."""
        return "score of images as they are; a difference is a log-odds"


def weights_of(batch: ImageBatch | TokenBatch, device: torch.device) -> dict[str, Tensor]:
    """`SeenViews.weights` of the pairs of a batch."""
    return {
        view: send(weight, device)
        for view, weight in side_weights(batch.strength, len(batch)).items()
    }
