"""Responses of a model that sees almost nothing, each close to the true one.

Bias-driven hallucination sampling. Nearly all image tokens are hidden from the model. It gets every
sentence of the chosen response up to a random place, after the true sentences before it, and
finishes it by what it believes without looking. What is not different enough from the chosen
response is made again under another mask; the last time the model writes freely, and that is taken
as it is.

Source: Amirloo et al. 2024, arXiv:2407.02477. There is no published code. The paper does not say at
what the cut may fall nor how the model decodes; here it falls between words, at least one of which
stays and one is to be written, and `temperature` says the latter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.data.responses.chat import EncodedPrompt
from diffalign.data.responses.questions import Question, Unmade
from diffalign.generation.writing import Request
from diffalign.ranges import AtLeast, Between
from diffalign.seeding import cpu_generator, derive_seed, unit_interval
from diffalign.synthesis.base import (
    SAME_RESPONSE,
    AbstractSynthesis,
    Context,
    Made,
    Maker,
    messages,
    prepared,
    response_to,
)
from diffalign.synthesis.similarity import Similarity, SimilarityConfig

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The sentences of a text, as [start, end) in characters.

    A sentence ends after `.`, `!` or `?` before white space, or with the text. Abbreviations such
    as `Dr.` end one too: no language data is needed for it.
    """
    return [match.span() for match in _SENTENCE.finditer(text.rstrip())]


_VERDICT = re.compile(r"^\s*(Yes|yes|No|no)\b")
_OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class BDHS(AbstractSynthesis):
    """The chosen response of the data set next to one that was written almost blindly."""

    form: ClassVar[str] = "trl"
    image_columns: ClassVar[tuple[str, ...]] = ("images",)

    hide_probability: Annotated[float, Between(0, 1)] = 0.99
    """How likely each image token is hidden: the threshold of rho in the paper, for LLaVA-1.6."""
    flip_probability: Annotated[float, Between(0, 1)] = 0.5
    """How likely a sentence that begins with yes or no is turned round before it is cut."""
    accept_below: float = 0.97
    """Similarity to the chosen response under which a response is taken; the paper's epsilon_s, for
    the network that `similarity` has by default."""
    iterations: Annotated[int, AtLeast(1)] = 5
    """Attempts at most; the last one is free, and is taken whatever its similarity."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """At which the model writes; 0 always takes the most probable token. Ours."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 512
    """Of a free response, and of each sentence. Ours."""
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """By what responses are compared."""

    def check(self) -> None:
        self.similarity.check()

    def tools(self) -> dict[str, str]:
        return {"similarity": self.similarity.name}

    def open(self, context: Context) -> Maker:
        return _Guesser(
            settings=self, context=context, compare=self.similarity.open(context.writer)
        )


@dataclass(frozen=True, kw_only=True)
class _Guesser:
    """Makes the rejected responses of a few questions at once."""

    settings: BDHS
    context: Context
    compare: Similarity

    def __call__(self, questions: Sequence[Question]) -> list[Made | Unmade]:
        by_id = {question.sample_id: question for question in questions}
        open_ones, results = prepared(questions, self._prompt)
        for attempt in range(self.settings.iterations):
            if not open_ones:
                break
            free = attempt == self.settings.iterations - 1
            asked = [(by_id[name], prompt) for name, prompt in open_ones.items()]
            texts = self._attempt(asked, attempt, free=free)
            chosen = [response_to(question) for question, _ in asked]
            cosines = self.compare(chosen, texts).tolist()
            for (question, _), text, cosine in zip(asked, texts, cosines, strict=True):
                if free or cosine < self.settings.accept_below:
                    results[question.sample_id] = self._result(question, text, cosine, attempt)
                    del open_ones[question.sample_id]
        return [results[question.sample_id] for question in questions]

    def _prompt(self, question: Question) -> EncodedPrompt:
        images = [self.context.image(image) for image in question.images]
        prompt = self.context.writer.prompt(question.turns, images)
        longest = self.context.writer.go_on(prompt, response_to(question))
        self.context.writer.check_length(longest, self.settings.max_new_tokens)
        return prompt

    def _attempt(
        self, asked: Sequence[tuple[Question, EncodedPrompt]], attempt: int, *, free: bool
    ) -> list[str]:
        """One response a question, all sentences of all of them in one batch."""
        started = [[""] if free else self._cut_sentences(some, attempt) for some, _ in asked]
        requests = [
            self._request(question, prompt, text, place, attempt)
            for (question, prompt), beginnings in zip(asked, started, strict=True)
            for place, text in enumerate(beginnings)
        ]
        written = iter(
            self.context.writer.write(
                requests,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                one_sentence=not free,
            )
        )
        responses = []
        for (question, _), beginnings in zip(asked, started, strict=True):
            endings = [next(written).text for _ in beginnings]
            joined = endings[0] if free else _joined(response_to(question), beginnings, endings)
            responses.append(joined.strip())
        return responses

    def _cut_sentences(self, question: Question, attempt: int) -> list[str]:
        """The request for each sentence: all true ones before it, and a part of it."""
        response = response_to(question)
        beginnings = []
        for place, (start, end) in enumerate(sentence_spans(response)):
            path = (self.context.seed, question.sample_id, attempt, place)
            sentence = response[start:end]
            if unit_interval(*path, "flip") < self.settings.flip_probability:
                sentence = flipped(sentence)
            beginnings.append(response[:start] + cut(sentence, unit_interval(*path, "cut")))
        return beginnings

    def _request(
        self, question: Question, prompt: EncodedPrompt, started: str, place: int, attempt: int
    ) -> Request:
        path = (self.context.seed, question.sample_id, attempt)
        writer = self.context.writer
        request = writer.go_on(prompt, started, seed=derive_seed(*path, "words", place))
        hidden = hidden_tokens(
            len(writer.image_positions(request)),
            self.settings.hide_probability,
            derive_seed(*path, "sight"),  # the same for all sentences of a response
        )
        return replace(request, hidden=hidden)

    def _result(self, question: Question, text: str, cosine: float, attempt: int) -> Made | Unmade:
        chosen = response_to(question)
        if text == chosen or not text:
            return Unmade(
                sample_id=question.sample_id, reason=SAME_RESPONSE, detail=repr(text)[:60]
            )
        return Made(
            sample_id=question.sample_id,
            values={
                "images": [self.context.images.name(image) for image in question.images],
                "prompt": messages(question.turns),
                "chosen": chosen,
                "rejected": text,
                "similarity": round(cosine, 4),
                "compared_by": self.settings.similarity.name,
                "attempts": attempt + 1,
            },
        )


def hidden_tokens(count: int, probability: float, seed: int) -> Tensor:
    """Which image tokens are out of sight: bool [count], each with the same probability."""
    return torch.rand(count, generator=cpu_generator(seed)) < probability


def flipped(sentence: str) -> str:
    """The sentence with its leading yes or no turned round; others stay as they are."""
    return _VERDICT.sub(lambda match: match[0].replace(match[1], _OPPOSITE[match[1]]), sentence)


def cut(sentence: str, position: float) -> str:
    """The first words of a sentence: at least one of them, and all but one at most.

    Args:
        sentence: of one word or more; a single word stays whole but for its full stop.
        position: in [0, 1), uniform over the places between two words.
    """
    ends = [match.end() for match in _WORD.finditer(sentence)]
    if len(ends) == 1:
        return sentence.rstrip(".!?")
    return sentence[: ends[int(position * (len(ends) - 1))]]


def _joined(response: str, beginnings: Sequence[str], endings: Sequence[str]) -> str:
    """Sentences that the model finished, with what is between the true ones."""
    text, after = "", 0
    for (start, end), started, ending in zip(
        sentence_spans(response), beginnings, endings, strict=True
    ):
        finished, stop, _ = ending.partition(".")
        text += response[after:start] + started[start:] + (finished + stop).rstrip()
        after = end
    return text
