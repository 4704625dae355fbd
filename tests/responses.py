"""Batches of responses about random image_counts, for tiny vision-language models."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from diffalign.data.batches import TokenBatch
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.corruptions.diffuse import Diffuse
from diffalign.data.responses.records import IMAGE, ResponsePair, Turn
from diffalign.data.responses.samples import TokenSample, TokenSampleMaker
from diffalign.data.responses.token_weights.changed import Changed
from diffalign.likelihoods.tokens import Tokens
from diffalign.seeding import derive_seed

TEXTS = (
    ("a red cat sits here", "a dog"),
    ("T", "two cats and a table"),
    ("the table", "the cat, the table"),
    ("no", "yes"),
)
SIZES = ((20, 12), (12, 24), (16, 16))
"""Of the image_counts of a sample; none of them is that of a tile."""


def random_image(*path: Any, size: tuple[int, int]) -> Image.Image:
    """Noise that depends on its path alone."""
    generator = torch.Generator().manual_seed(derive_seed("picture", *path))
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pair(number: int, image_counts: int) -> ResponsePair:
    """Response pair `number` about so many image_counts."""
    images = []
    for place in range(image_counts):
        stream = io.BytesIO()
        random_image(number, place, size=SIZES[place]).save(stream, "png")
        images.append(stream.getvalue())
    chosen, rejected = TEXTS[number % len(TEXTS)]
    question = "".join([f"{IMAGE}\n"] * image_counts) + "What is it?" + " Look!" * number
    return ResponsePair(
        sample_id=f"sample-{number}",
        images=tuple(images),
        turns=(Turn(role="user", text=question),),
        responses={"chosen": chosen, "rejected": rejected},
    )


def response_batch(
    processor: Any,
    *views: str,
    image_counts: Sequence[int] = (1, 0, 3),
    order: Sequence[int] | None = None,
    likelihood: Tokens | None = None,
) -> TokenBatch:
    """A batch of pairs, number i about `image_counts[i]` image_counts.

    Args:
        processor: of the model.
        *views: that the batch serves; `chosen` and `rejected` if none is given.
        image_counts: one number a pair.
        order: of the rows; as they come, if None.
        likelihood: may make weights or responses by itself.
    """
    asked = frozenset(views or ("chosen", "rejected"))
    config = ResponseConfig(
        path="unused",
        conditions={"diffuse": Diffuse()},
        weights={"changed": Changed()},
    )
    maker = TokenSampleMaker(
        config=config,
        views=asked if likelihood is None else likelihood.data_views(asked),
        run_seed=0,
        encoder=ChatEncoder(processor),
    )
    samples = [maker.make(pair(i, image_counts[i]), 0) for i in order or range(len(image_counts))]
    assert all(isinstance(sample, TokenSample) for sample in samples), samples
    batch = stack_tokens(samples, maker.encoder.pad_token_id)
    return dataclasses.replace(batch, views=asked)
