"""Batches of responses without an image, a word or a weight, for the memory of a run's step.

The longest rows are planned for that `responses.max_length` lets through, since one such batch is
enough to end a run.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import cast

import torch

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.data.responses.micro_batches import rows_of_sample
from diffalign.data.token_budget import padded_tokens
from diffalign.errors import ConfigError
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.simulation import META
from diffalign.models.vlm.blank import BlankImage, blank_image, blank_row
from diffalign.models.vlm.config import VLM
from diffalign.training.config import RunConfig
from diffalign.views import View

PROMPT = 64
"""Tokens of a prompt next to its image: an assumption. What a row has besides are its response."""


def blank_image_of(run: RunConfig) -> BlankImage:
    """The image of a pair, the largest where a family gives large ones more tokens: half a row."""
    return blank_image(cast(VLM, run.model), most_tokens=longest_row(run) // 2)


def longest_row(run: RunConfig) -> int:
    """Tokens of the longest conversation with its response that is not skipped."""
    assert run.responses is not None
    context = cast(VLM, run.model).context
    return min(run.responses.max_length, context or run.responses.max_length)


def longest_sample(run: RunConfig) -> int:
    """Tokens that `training.tokens_per_device` has to allow: of a sample in rows of its own."""
    read = run.likelihood.data_views(run.objective.views)
    return rows_of_sample(read, paired=True) * longest_row(run)


def fullest_pass(run: RunConfig, before: int, longest: int) -> tuple[int, int]:
    """How many samples a forward pass has at its fullest, and tokens of each of their responses.

    Args:
        run: the run.
        before: tokens of an image with its prompt.
        longest: tokens of the longest conversation with its response.

    Returns:
        `samples_per_device` of the longest; where `tokens_per_device` bounds passes, the fewest
        that come to so many tokens, as long as these allow.
    """
    training = run.training
    if training.tokens_per_device is None:
        return training.samples_per_device, longest
    shared = cast(Tokens, run.likelihood).shares_prefix(cast(VLM, run.model))
    views = map(View.parse, run.likelihood.data_views(run.objective.views))
    read = Counter(condition for condition, _ in {(v.condition, v.response) for v in views})

    def tokens(length: int) -> int:
        own = length - before
        rows = ([before + own * n] if shared else [length] * n for n in read.values())
        return padded_tokens([row for some in rows for row in some])

    most = training.tokens_per_device
    samples = min(training.samples_per_device * training.accumulation, ceil(most / tokens(longest)))
    fitting = (n for n in range(longest, before, -1) if samples * tokens(n) <= most)
    return samples, next(fitting, before + 1)


def blank_token_batch(run: RunConfig) -> TokenBatch:
    """A batch of the run's size: pairs about one image each, all of them of the longest rows.

    Raises:
        ConfigError: image and prompt alone are longer than a row may be.
        ModelError: the images of the model's family are not known.
    """
    model, image, longest = cast(VLM, run.model), blank_image_of(run), longest_row(run)
    before = len(blank_row(model, image, PROMPT)["input_ids"])
    if before >= longest:
        raise ConfigError(
            f"responses.max_length is {longest}, and an image of {image.tokens} tokens with a "
            f"prompt of {PROMPT} leaves nothing for a response: raise it, or lower "
            f"model.image_pixels where the family has it"
        )
    n, longest = fullest_pass(run, before, longest)
    row = blank_row(model, image, longest - before + PROMPT)
    row = {name: values.expand(n, -1).contiguous() for name, values in row.items()}
    ids = row.pop("input_ids")
    is_response = (torch.arange(longest) >= before).expand(n, -1).contiguous()
    read = run.likelihood.data_views(run.objective.views)
    views = sorted(map(View.parse, read), key=str)
    responses = sorted({view.response for view in views})
    return TokenBatch(
        sample_ids=tuple(map(str, range(n))),
        visits=(0,) * n,
        views=run.objective.views,
        responses={
            # They differ from their first token on.
            name: TokenRows(
                input_ids=ids + number * is_response.long(),
                attention_mask=torch.ones_like(ids),
                response_mask=is_response,
                further=row,
            )
            for number, name in enumerate(responses)
        },
        image_inputs={view.condition: image.repeated(n) for view in views},
        image_counts=torch.ones(n, dtype=torch.int64),
        weights={
            f"{view.response}:{view.weights}": torch.ones(n, longest)
            for view in views
            if view.weights is not None
        },
        strength={part: torch.empty(n, device=META) for part in run.responses.strength.asked}
        if run.responses is not None
        else {},
    )
