"""Batches of responses without an image, a word or a weight, for the memory of a run's step.

The longest rows are planned for that `responses.max_length` lets through, since one such batch is
enough to end a run.
"""

from __future__ import annotations

from typing import cast

import torch

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.errors import ConfigError
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


def blank_token_batch(run: RunConfig) -> TokenBatch:
    """A batch of the run's size: pairs about one image each, all of them of the longest rows.

    Raises:
        ConfigError: image and prompt alone are longer than a row may be.
        ModelError: the images of the model's family are not known.
    """
    model, image, longest = cast(VLM, run.model), blank_image_of(run), longest_row(run)
    n = run.training.samples_per_device
    before = len(blank_row(model, image, PROMPT)["input_ids"])
    if before >= longest:
        raise ConfigError(
            f"responses.max_length is {longest}, and an image of {image.tokens} tokens with a "
            f"prompt of {PROMPT} leaves nothing for a response: raise it, or lower "
            f"model.image_pixels where the family has it"
        )
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
