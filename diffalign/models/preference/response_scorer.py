"""Scores of responses by a reward model that `diffalign train` made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.data.batches import TokenBatch
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.records import Turn
from diffalign.data.responses.samples import TokenSample
from diffalign.errors import ModelError
from diffalign.models.devices import send
from diffalign.models.preference.rewards import content_of, exported, open_reward, settings_of
from diffalign.models.preference.vlm_reward import VLMReward
from diffalign.views import View

_NAME = "response"
"""Of the one response of each row."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A response in its conversation."""

    turns: Sequence[Turn]
    """Up to the response; the last one is the user's."""
    images: Sequence[Image]
    """RGB, in reading order; as many as there are markers in the turns."""
    response: str


class ResponseScorer:
    """Scores of responses; a difference of two to the same conversation is a log-odds."""

    def __init__(
        self, path: str | Path, *, device: torch.device | str = "cpu", batch_size: int = 8
    ) -> None:
        """Read a model.

        Args:
            path: of a run with `model.kind: vlm_reward` and `candidates: responses`, or its
                `final`.
            device: where it goes.
            batch_size: responses in one pass of the network, which bounds its memory.

        Raises:
            ModelError: there is none, it scores images, or it compares and scores nothing.
        """
        folder = exported(Path(path).expanduser())
        self.fingerprint = f"response_reward-{content_of(folder)}"
        self._model = open_reward(folder, device=device, of_responses=True)
        if self._model.head.compares or self._model.head.known_users:
            raise ModelError(
                f"{path} has {self._model.head.describe()}, which gives a response no score of its "
                f"own: train head.kind linear"
            )
        settings = settings_of(folder)
        assert isinstance(settings, VLMReward), "the one kind of responses"
        self._encoder = ChatEncoder(settings.processor(), settings.context)
        self._batch_size = batch_size

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of n responses, higher is better.

        Raises:
            UnusableRowError: a conversation or response cannot be read as the model takes them.
        """
        found: list[float] = []
        for start in range(0, len(candidates), self._batch_size):
            some = candidates[start : start + self._batch_size]
            samples = [self._sample(candidate) for candidate in some]
            batch = stack_tokens(samples, self._encoder.pad_token_id)
            inputs = {
                name: send(value, self._model.device)
                for name, value in inputs_of(batch, View.parse(_NAME)).items()
            }
            with torch.no_grad():
                found += self._model.outputs(inputs, None).tolist()
        return found

    def _sample(self, candidate: Candidate) -> TokenSample:
        prompt = self._encoder.prompt(candidate.turns, candidate.images)
        return TokenSample(
            sample_id="",
            visit=0,
            views=frozenset({_NAME}),
            responses={_NAME: self._encoder.response(prompt, candidate.response)},
            image_inputs={None: prompt.image_inputs},
            image_count=len(candidate.images),
            weights={},
        )


def inputs_of(batch: TokenBatch, view: View) -> dict[str, Tensor]:
    """Rows of a view as a model takes them, right-padded, with their images."""
    rows = batch.responses[view.response]
    return {
        "input_ids": rows.input_ids,
        "attention_mask": rows.attention_mask,
        **rows.further,
        **batch.images_of(view.response, view.condition),
    }
