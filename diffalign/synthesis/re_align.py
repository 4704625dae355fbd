"""The chosen response with its content blanked out and filled in again, looking at another image.

Re-Align: objects and attributes of the chosen response are masked; the model fills the masks while
it is shown the most similar other image of the data; the first of the nearest images whose response
differs enough gives the rejected response, and is the retrieved image of the row.

Source: Xing et al. 2025, arXiv:2502.13146. The code for this part is not published; what is not in
the paper is marked as ours.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.data.decoding import EncodedImage
from diffalign.data.responses.questions import Question, Unmade
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError
from diffalign.generation.writing import Request
from diffalign.ranges import AtLeast, Between
from diffalign.seeding import derive_seed, unit_interval
from diffalign.synthesis.base import (
    AbstractSynthesis,
    Context,
    Made,
    Maker,
    UnsuitedError,
    check_one_image,
    messages,
    prepared,
    response_to,
)
from diffalign.synthesis.phrases import PhraseConfig, Spans, blanked
from diffalign.synthesis.similarity import (
    Pooling,
    Similarity,
    SimilarityConfig,
    digest,
    embed,
    nearest,
    remembered,
)

MASK = "[MASK]"
NOTHING_TO_MASK = "nothing to mask"
NONE_DIFFERS = "no neighbour gave a response that differs enough"


@dataclass(frozen=True, kw_only=True)
class _Gallery:
    """All distinct images of the questions."""

    images: Sequence[EncodedImage]
    directions: Tensor
    """Float32 [m, width], each of length 1: what the tower makes of them."""
    number: dict[str, int]
    """Digest -> number of the image."""


@dataclass(frozen=True, kw_only=True)
class _Blanks:
    """A question whose response has been masked."""

    text: str
    neighbours: Sequence[int]
    """Numbers of images, the nearest first."""


@dataclass(frozen=True, kw_only=True)
class RetrieveAndFill(AbstractSynthesis):
    """The chosen response next to the same one with the content of a retrieved image."""

    form: ClassVar[str] = "re_align"
    image_columns: ClassVar[tuple[str, ...]] = ("image", "retrieved_image")

    neighbours: Annotated[int, AtLeast(1)] = 5
    """How many of the nearest images are tried, the nearest first. Ours."""
    accept_below: float = 0.95
    """Similarity to the chosen response under which a response is taken; for a network of
    sentence-transformers."""
    pooling: Pooling = "mean"
    """How the output of the vision tower becomes one vector: mean over the patches, or the class
    token. Ours."""
    mask_share: Annotated[float, Between(0, 1, without=[0])] = 1.0
    """How likely each phrase is masked; 1 masks all. Ours."""
    instruction: str = (
        "Here is an answer to the question '{question}' in which words are replaced by [MASK]: "
        "'{masked}' Replace every [MASK] by words that fit the image. Keep all other words as they "
        "are. Write nothing but the completed answer."
    )
    """The prompt that fills the masks, with {question} and {masked}. Ours."""
    temperature: float = 0.0
    """At which the model fills; 0 always takes the most probable token. Ours."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 512
    """Of a filled response. Ours."""
    phrases: PhraseConfig = field(default_factory=PhraseConfig)
    """How objects and attributes are found."""
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """By what responses are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            told = self.instruction.format(question="", masked=MASK * 3)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"instruction can be filled with {{question}} and {{masked}}, and wants {error}"
            ) from error
        if MASK * 3 not in told:
            raise ValueError("instruction must have {masked}, where the masked response is")

    def check(self) -> None:
        self.phrases.check()
        self.similarity.check()

    def tools(self) -> dict[str, str]:
        return {"phrases": self.phrases.name, "similarity": self.similarity.name}

    def open(self, context: Context) -> Maker:
        return _Filler(
            settings=self,
            context=context,
            gallery=_gallery(context, self.pooling),
            phrases=self.phrases.open(),
            compare=self.similarity.open(context.writer),
        )


@dataclass(frozen=True, kw_only=True)
class _Filler:
    """Makes the rejected responses of a few questions at once."""

    settings: RetrieveAndFill
    context: Context
    gallery: _Gallery
    phrases: Callable[[str], Spans]
    compare: Similarity

    def __call__(self, questions: Sequence[Question]) -> list[Made | Unmade]:
        """Try the nearest image of all questions, then the next one of those that are left."""
        by_id = {question.sample_id: question for question in questions}
        open_ones, results = prepared(questions, self._blank)
        least = dict.fromkeys(open_ones, 1.0)
        for rank in range(self.settings.neighbours):
            tried = [by_id[name] for name, some in open_ones.items() if rank < len(some.neighbours)]
            texts, unusable = self._fill(tried, open_ones, rank)
            results |= unusable
            chosen = [response_to(by_id[name]) for name in texts]
            cosines = self.compare(chosen, list(texts.values())).tolist() if texts else []
            for (name, text), cosine in zip(texts.items(), cosines, strict=True):
                least[name] = min(cosine, least[name])
                if text and cosine < self.settings.accept_below:
                    results[name] = self._made(by_id[name], open_ones[name], rank, text, cosine)
            open_ones = {name: some for name, some in open_ones.items() if name not in results}
        for name in open_ones:
            detail = f"the least similar has {least[name]:.3f}"
            results[name] = Unmade(sample_id=name, reason=NONE_DIFFERS, detail=detail)
        return [results[question.sample_id] for question in questions]

    def _blank(self, question: Question) -> _Blanks:
        check_one_image(question)
        response = response_to(question)
        self.context.image(question.images[0])
        path = (self.context.seed, question.sample_id, "mask")
        spans = [
            span
            for place, span in enumerate(self.phrases(response))
            if unit_interval(*path, place) < self.settings.mask_share
        ]
        if not spans:
            raise UnsuitedError(NOTHING_TO_MASK, repr(response)[:60])
        own = self.gallery.number[digest(question.images[0])]
        near = nearest(self.gallery.directions, own, k=self.settings.neighbours)
        return _Blanks(text=blanked(response, spans, MASK), neighbours=near)

    def _fill(
        self, questions: Sequence[Question], blanks: Mapping[str, _Blanks], rank: int
    ) -> tuple[dict[str, str], dict[str, Made | Unmade]]:
        """Filled responses by question, looking at neighbours of one rank; and failures."""

        def request(question: Question) -> Request:
            return self._request(question, blanks[question.sample_id], rank)

        requests, unusable = prepared(questions, request)
        written = self.context.writer.write(
            list(requests.values()),
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
        )
        texts = [some.text.strip() for some in written]
        return dict(zip(requests, texts, strict=True)), unusable

    def _request(self, question: Question, blanks: _Blanks, rank: int) -> Request:
        told = self.settings.instruction.format(question=question.text, masked=blanks.text)
        image = self.context.image(self.gallery.images[blanks.neighbours[rank]])
        turns = [Turn(role="user", text=f"{IMAGE}\n{told}")]
        seed = derive_seed(self.context.seed, question.sample_id, "fill", rank)
        request = self.context.writer.ask(self.context.writer.prompt(turns, [image]), seed=seed)
        self.context.writer.check_length(request, self.settings.max_new_tokens)
        return request

    def _made(
        self, question: Question, blanks: _Blanks, rank: int, text: str, cosine: float
    ) -> Made:
        retrieved = self.gallery.images[blanks.neighbours[rank]]
        return Made(
            sample_id=question.sample_id,
            values={
                "image": self.context.images.name(question.images[0]),
                "retrieved_image": self.context.images.name(retrieved),
                "chosen": messages(question.turns, response_to(question)),
                "rejected": messages(question.turns, text),
                "masked": blanks.text,
                "masked_by": self.settings.phrases.name,
                "similarity": round(cosine, 4),
                "compared_by": self.settings.similarity.name,
                "neighbour": rank + 1,
            },
        )


def _gallery(context: Context, pooling: Pooling) -> _Gallery:
    """The images of all questions that can be used, each once."""
    found = _distinct(context.questions)
    model = context.writer.model

    def compute() -> dict[str, Tensor]:
        return _features(list(found.values()), context, pooling)

    key = repr((list(found), pooling, model.fingerprint(), model.compute_dtype))
    key = hashlib.blake2b(key.encode()).hexdigest()
    seen = remembered(context.folder / "features.safetensors", key, compute)
    numbers = seen["numbers"].tolist()
    if len(numbers) < 2:
        raise DataError(
            f"retrieval needs other images; of the questions' {len(found)} different ones "
            f"{len(numbers)} can be used"
        )
    digests = list(found)
    return _Gallery(
        images=[found[digests[number]] for number in numbers],
        directions=torch.nn.functional.normalize(seen["features"].float(), dim=1),
        number={digests[number]: place for place, number in enumerate(numbers)},
    )


def _distinct(questions: Sequence[Question | Unmade]) -> dict[str, EncodedImage]:
    """Every image once, by its digest; those that are not there are left to their questions."""
    found: dict[str, EncodedImage] = {}
    for question in questions:
        for image in question.images if isinstance(question, Question) else ():
            with contextlib.suppress(OSError):
                found.setdefault(digest(image), image)
    return found


def _features(
    images: Sequence[EncodedImage], context: Context, pooling: Pooling
) -> dict[str, Tensor]:
    """Embeddings of the images that can be decoded, and the numbers of these."""
    numbers: list[int] = []
    features: list[Tensor] = []
    size = context.writer.batch_size
    for start in range(0, len(images), size):
        decoded = []
        for number, image in enumerate(images[start : start + size], start=start):
            with contextlib.suppress(UnusableRowError):
                decoded.append(context.image(image))
                numbers.append(number)
        if decoded:
            features.append(embed(context.writer.model, decoded, pooling=pooling))
    return {
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "features": torch.cat(features) if features else torch.zeros(0, 1),
    }
