"""From rows of a round to batches: prompts, sampled tokens, and how probable they once were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from diffalign.data.batches import TokenBatch
from diffalign.data.decoding import BadImageError, decode
from diffalign.data.responses.chat import ChatEncoder, EncodedPrompt, EncodedResponse
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.questions import Question, Questions
from diffalign.data.responses.samples import TokenSample
from diffalign.data.skipping import UnusableRowError
from diffalign.data.strength.base import Strength
from diffalign.generation.writing import Written
from diffalign.likelihoods.token_rows import RowsOfBatch
from diffalign.models.base import AbstractModel
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.rollouts.response_rounds import SAMPLED, Row


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The responses of one visit, as they were written: a line of a file."""

    visit: int
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log_probs: tuple[tuple[float, ...], ...] = ()
    """Of the tokens under the policy that wrote them; empty where training asks for none."""
    unfinished: int = 0
    unusable: str | None = None


@dataclass(frozen=True)
class ResponseBatches:
    """Questions and rows, as the model reads them."""

    questions: Questions
    views: frozenset[str]
    """Of the rows."""
    model: AbstractModel
    """Settings of the model; its processor is read when it is needed."""
    max_pixels: int
    """Larger images are refused unread."""

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Of the model's own processor."""
        assert isinstance(self.model, VLM), "the section was checked"
        return ChatEncoder(self.model.processor())

    def prompt(self, question: Question) -> EncodedPrompt:
        """A question with its images.

        Raises:
            UnusableRowError: an image cannot be read, or markers and images differ in number.
        """
        try:
            images = [decode(image, max_pixels=self.max_pixels) for image in question.images]
        except BadImageError as error:
            raise UnusableRowError(error.reason, error.detail) from error
        return self.encoder.prompt(question.turns, images)

    def check_data(self, prompt: EncodedPrompt, question: Question, views: Sequence[str]) -> None:
        """Raise UnusableRowError where a response of the data set cannot be a row."""
        for view in views:
            self.encoder.response(prompt, _of_data(question, view))

    def batch(
        self, rows: Sequence[Row], members: Mapping[int, int], sampled: Mapping[int, Sampled]
    ) -> TokenBatch:
        """A batch of rows.

        Args:
            rows: at least one.
            members: number of the question of each visit.
            sampled: responses of each visit.
        """
        samples = [self._sample(row, members, sampled) for row in rows]
        batch = stack_tokens(samples, self.encoder.pad_token_id)
        return _remembering(batch, rows, sampled)

    def log_probs(
        self,
        model: VisionLanguageModel,
        prompt: EncodedPrompt,
        images: int,
        written: Sequence[Written],
    ) -> tuple[tuple[float, ...], ...]:
        """Of the tokens of responses to one prompt, as training computes them."""
        batch = stack_tokens(
            [
                TokenSample(
                    sample_id="",
                    visit=0,
                    views=frozenset({SAMPLED}),
                    responses={SAMPLED: self.encoder.sampled(prompt, some.tokens)},
                    image_inputs={None: prompt.image_inputs},
                    image_count=images,
                    weights={},
                )
                for some in written
            ],
            self.encoder.pad_token_id,
        )
        rows = RowsOfBatch(model, batch)
        found = rows.tokens((SAMPLED, None)).spread(rows.log_probs((SAMPLED, None))).cpu()
        masks = batch.responses[SAMPLED].response_mask
        return tuple(
            tuple(values[mask].tolist()) for values, mask in zip(found, masks, strict=True)
        )

    def _sample(
        self, row: Row, members: Mapping[int, int], sampled: Mapping[int, Sampled]
    ) -> TokenSample:
        question = self.questions[members[row.visit]]
        assert isinstance(question, Question), "rows are of what could be asked"
        prompt = self.prompt(question)

        def encoded(name: str, place: int | None) -> EncodedResponse:
            if place is not None:
                tokens = torch.tensor(sampled[row.visit].tokens[place])
                return self.encoder.sampled(prompt, tokens)
            return self.encoder.response(prompt, _of_data(question, name))

        return TokenSample(
            sample_id=row.sample_id,
            visit=0,
            views=self.views,
            responses={name: encoded(name, place) for name, place in row.responses.items()},
            image_inputs={None: prompt.image_inputs},
            image_count=len(question.images),
            weights={},
            strength=Strength(
                advantage=row.advantage, preference=row.preference, target=row.target
            ),
        )


def _remembering(
    batch: TokenBatch, rows: Sequence[Row], sampled: Mapping[int, Sampled]
) -> TokenBatch:
    """A batch with the log-probabilities of its tokens as they were, where they were kept."""
    if not all(sampled[row.visit].log_probs for row in rows):
        return batch
    old = {}
    for view, tokens in batch.responses.items():
        places = [row.responses[view] for row in rows]
        known = [
            sampled[row.visit].log_probs[place]
            for row, place in zip(rows, places, strict=True)
            if place is not None
        ]
        old[view] = torch.zeros(tokens.input_ids.shape)
        for values, mask, own in zip(old[view], tokens.response_mask, known, strict=True):
            values[mask] = torch.tensor(own)
    return replace(batch, old_log_probs=old)


def _of_data(question: Question, view: str) -> str:
    """The response of the data set that a view shows."""
    text = question.response if view == "chosen" else question.rejected
    assert text is not None, "the obstacle of the rollouts comes first"
    return text
