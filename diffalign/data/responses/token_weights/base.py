"""A weight map: how much each token of a response counts in its log-likelihood."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.data.responses.chat import EncodedResponse
from diffalign.data.responses.records import Span
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.ranges import Ranged

Encoded = Mapping[str, EncodedResponse]
Spans = Mapping[str, tuple[Span, ...]]


@dataclass(frozen=True, kw_only=True)
class AbstractTokenWeights(Ranged, abc.ABC):
    """Weights of the tokens of one response, from the responses of its row and what is said of
    their parts."""

    def reads(self, response: str) -> frozenset[str]:
        """Responses whose tokens `weigh` looks at; those of `response` itself as a rule."""
        return frozenset({response})

    @abc.abstractmethod
    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        """Weights of the tokens of a response, the end-of-sequence token last.

        Args:
            response: its name.
            encoded: the responses that `reads` names, by name.
            spans: parts of responses that the data set judges, by response.

        Returns:
            Float32 [N], not negative.

        Raises:
            UnusableRowError: the row lacks what the weights are made from, or nothing counts.
        """


def span_of_tokens(response: str, encoded: Encoded, spans: Spans) -> Tensor:
    """Which judged part each token of a response belongs to.

    A token belongs where its last character lies, so that a space before a word goes with the word.

    Returns:
        Int64 [N - 1], positions in `spans[response]`, or -1 for tokens in none of the parts. The
        end-of-sequence token is not among them.

    Raises:
        UnusableRowError: no part of the response is judged.
    """
    parts = spans.get(response, ())
    if not parts:
        raise UnusableRowError(
            SkipReason.UNJUDGED, "the row says nothing about parts of it", response
        )
    starts, ends = torch.tensor([(part.start, part.end) for part in parts]).T.contiguous()
    last_characters = encoded[response].offsets[:-1, 1].contiguous() - 1
    found = torch.searchsorted(starts, last_characters, right=True) - 1
    return torch.where(last_characters < ends[found], found, -1)
