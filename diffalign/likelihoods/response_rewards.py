"""What a reward model says of responses about images: Bradley-Terry on pairs of responses.

The score is read off the hidden state of the token that ends a response, which has seen the images,
the conversation and the whole response.

Source: Stiennon et al. 2020, arXiv:2009.01325; Bradley-Terry on responses about images: Sun et al.
2023, arXiv:2309.14525 (LLaVA-RLHF).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.data.batches import TokenBatch
from diffalign.data.responses.collate import join_rows
from diffalign.likelihoods.rewards import AbstractRewards, SeenViews, weights_of
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.preference.response_scorer import inputs_of
from diffalign.models.preference.rewards import AbstractRewardModel, RewardModel
from diffalign.views import View


@dataclass(frozen=True, kw_only=True)
class ResponseRewards(AbstractRewards[TokenBatch]):
    """Scores of responses by a reward model, a difference of which is a log-odds."""

    batch_type: ClassVar[type] = TokenBatch

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, AbstractRewardModel) or not model.of_responses:
            raise ValueError(
                "response_rewards are those of a reward model of responses: set model.kind to "
                "vlm_reward, and model.candidates to responses"
            )

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """The views themselves, each a whole response."""
        for view in map(View.parse, sorted(views)):
            if view.weights is not None:
                raise ValueError(
                    f"the view {view} weighs tokens, and a reward model scores whole responses"
                )
        return views

    def shares_prefix(self, model: AbstractModel) -> bool:
        """No: a score is read at the end of a row."""
        return False

    def packing_obstacle(self, model: AbstractModel) -> str:
        """Why rows do not go one after the other through the model."""
        return "a reward model scores each response in a row of its own"

    @torch.no_grad()
    def prepare(self, model: RewardModel, batch: TokenBatch) -> SeenViews:
        """Bring the conversations with their responses to the device."""
        views = tuple(sorted(batch.views))
        inputs = join_rows([inputs_of(batch, View.parse(view)) for view in views])
        return SeenViews(
            views=views,
            inputs={name: send(value, model.device) for name, value in inputs.items()},
            users=None,
            weights=weights_of(batch, model.device),
        )

    def describe(self) -> str:
        """One line for the start of a run."""
        return "score of responses, read at the token that ends them; a difference is a log-odds"
