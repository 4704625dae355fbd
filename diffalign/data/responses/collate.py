"""Token samples to a batch, and prompts to arguments of `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.data.responses.chat import EncodedPrompt, EncodedResponse
from diffalign.data.responses.samples import TokenSample
from diffalign.data.strength.base import stack_strengths


def stack_tokens(samples: Sequence[TokenSample], pad_token_id: int) -> TokenBatch:
    """A batch of samples with the same views.

    Args:
        samples: with images or without; not empty.
        pad_token_id: what shorter rows end with, hidden by the attention mask.
    """
    names = sorted({name for sample in samples for name in sample.responses})
    holders = {name: [s for s in samples if name in s.responses] for name in names}
    weights = dict.fromkeys(name for sample in samples for name in sample.weights)
    conditions = dict.fromkeys(c for sample in samples for c in sample.image_inputs)
    paired = samples[0].paired
    return TokenBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        visits=tuple(sample.visit for sample in samples),
        views=samples[0].views,
        responses={
            name: _rows([sample.responses[name] for sample in holders[name]], pad_token_id)
            for name in names
        },
        image_inputs={
            condition: join_image_inputs([sample.image_inputs[condition] for sample in samples])
            for condition in conditions
        }
        if paired
        else {},
        own_image_inputs=_own_images(samples)
        if paired
        else {
            (name, condition): join_image_inputs([s.image_inputs[condition] for s in holders[name]])
            for name in names
            for condition in dict.fromkeys(c for s in holders[name] for c in s.image_inputs)
        },
        rows=None
        if paired
        else {
            name: torch.tensor([i for i, s in enumerate(samples) if name in s.responses])
            for name in names
        },
        image_counts=torch.tensor([sample.image_count for sample in samples]),
        strength=stack_strengths([sample.strength for sample in samples]),
        weights={
            name: pad_sequence(
                [sample.weights[name] for sample in samples if name in sample.weights],
                batch_first=True,
            )
            for name in weights
        },
    )


def _own_images(
    samples: Sequence[TokenSample],
) -> dict[tuple[str, str | None], dict[str, Tensor]]:
    """Of every response that is about other images in some sample; the others see the shared ones
    again."""
    groups = dict.fromkeys(group for sample in samples for group in sample.own_image_inputs)
    return {
        group: join_image_inputs(
            [s.own_image_inputs.get(group, s.image_inputs[group[1]]) for s in samples]
        )
        for group in groups
    }


def stack_prompts(prompts: Sequence[EncodedPrompt], pad_token_id: int) -> dict[str, Tensor]:
    """Keyword arguments of `generate`: prompts padded on the left, and all of their images."""
    ids = [prompt.input_ids for prompt in prompts]
    return {
        "input_ids": _left_padded(ids, pad_token_id),
        "attention_mask": _left_padded([torch.ones_like(row) for row in ids], 0),
        **{
            name: _left_padded([prompt.further[name] for prompt in prompts], 0)
            for name in prompts[0].further
        },
        **join_image_inputs([prompt.image_inputs for prompt in prompts]),
    }


def join_image_inputs(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of an image processor for several rows, as if it had seen all images in order.

    Rows without images are empty. Where images have different numbers of tiles, the shorter
    ones are filled up with zeros, as processors do it.
    """
    shown = [row for row in rows if row]
    return {name: _joined([row[name] for row in shown]) for name in (shown[0] if shown else ())}


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of a model for several groups of rows, one after the other; tokens of the shorter ones
    are filled up with zeros, which their attention mask hides."""
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _rows(responses: Sequence[EncodedResponse], pad_token_id: int) -> TokenRows:
    def padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value)

    return TokenRows(
        input_ids=padded([response.input_ids for response in responses], pad_token_id),
        attention_mask=padded([torch.ones_like(response.input_ids) for response in responses]),
        response_mask=padded([response.response_mask for response in responses]),
        further={
            name: padded([response.further[name] for response in responses])
            for name in responses[0].further
        },
    )


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.stack([pad(row, (longest - len(row), 0), value=value) for row in rows])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first dimension; the others are filled up to the largest."""
    inner = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(inner, tensor.shape[1:], strict=True)]
        filled.append(pad(tensor, [n for gap in reversed(missing) for n in (0, gap)]))
    return torch.cat(filled)
