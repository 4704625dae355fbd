"""What a model makes of single responses: log-probabilities token by token, and where it looked.

Where the model looked is how much the log-probability of a response hangs on each patch of its
first image: the gradient with respect to the pixels times the pixels, without its sign (Shrikumar
et al. 2017, arXiv:1605.01713).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffalign.data.batches import TokenBatch
from diffalign.likelihoods.token_rows import RowsOfBatch
from diffalign.models.devices import evaluation_mode, send
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.vision_pass import ImageInputs

_PIXELS = "pixel_values"
_GRID = "image_grid_thw"


def response_log_probs(model: VisionLanguageModel, batch: TokenBatch, response: str) -> Tensor:
    """Log-probabilities of the tokens of a response, [N] on the CPU, without gradient.

    Args:
        model: the policy as it is.
        batch: of one sample.
        response: such as `chosen`.
    """
    return RowsOfBatch(model, batch).log_probs((response, None)).float().cpu()


def patches_looked_at(
    model: VisionLanguageModel, batch: TokenBatch, response: str
) -> Tensor | None:
    """How much the log-probability of a response hangs on each patch of its first image.

    Args:
        model: the policy as it is.
        batch: of one sample.
        response: such as `chosen`.

    Returns:
        Shape [rows, columns] of patches, at least 0, on the CPU; None where there is no image, or
        its pixels lie in a form that is not known here.
    """
    inputs = {k: send(v, model.device) for k, v in batch.image_inputs[None].items()}
    if _PIXELS not in inputs:
        return None
    pixels = inputs[_PIXELS].detach().clone().requires_grad_()
    forward, group = RowsOfBatch(model, batch), (response, None)
    (rows,) = forward.rows([(group,)], [forward.tokens(group).ids[:, None]], concatenated=False)
    seen = replace(rows, image_inputs=ImageInputs(inputs={**inputs, _PIXELS: pixels}))
    with evaluation_mode(model.unwrapped), torch.enable_grad():
        (scores,) = model.score([seen])
        (gradient,) = torch.autograd.grad(scores.log_probs.sum(), pixels)
    weight = (gradient * pixels.detach()).abs().float().cpu()
    merge = int(getattr(model.processor.image_processor, "merge_size", 1) or 1)
    return by_patches(weight, inputs, patch=model.patch_size, merge=merge)


def seen_image(model: VisionLanguageModel, batch: TokenBatch) -> Image.Image | None:
    """The first image as the model gets it: cropped, padded or a tile, where its processor does so.

    Args:
        model: whose processor made the batch.
        batch: of one sample.

    Returns:
        What the map of `patches_looked_at` lies over; None where patches are those of the whole
        image, or there is none.
    """
    pixels = batch.image_inputs[None].get(_PIXELS)
    if pixels is None or pixels.dim() not in (4, 5):
        return None
    first = (pixels[0] if pixels.dim() == 4 else pixels[0, 0]).float().cpu()
    settings = model.processor.image_processor
    if getattr(settings, "do_normalize", True):
        mean, spread = (
            torch.tensor(getattr(settings, name)).view(-1, 1, 1)
            for name in ("image_mean", "image_std")
        )
        first = first * spread + mean
    values = (first * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def by_patches(
    weight: Tensor, inputs: Mapping[str, Tensor], *, patch: int | None, merge: int
) -> Tensor | None:
    """Weights of pixels, or of rows of patches, as a map of the first image.

    Args:
        weight: in the shape of `pixel_values`: [n, 3, H, W], with tiles [n, tiles, 3, H, W], of
            which the first shows the whole image, or rows of flattened patches [N, values].
        inputs: of the image processor; rows of patches need `image_grid_thw`.
        patch: side of a patch in pixels.
        merge: side of the blocks in whose order rows of patches lie.

    Returns:
        Shape [rows, columns]; None for another form.
    """
    if weight.dim() == 5:
        weight = weight[:, 0]
    if weight.dim() == 4 and patch:
        return avg_pool2d(weight[:1].sum(dim=1, keepdim=True), patch)[0, 0]
    if weight.dim() == 2 and _GRID in inputs:
        times, height, width = (int(side) for side in inputs[_GRID][0])
        rows = weight[: times * height * width].sum(dim=1)
        blocks = rows.view(times, height // merge, width // merge, merge, merge)
        return blocks.permute(0, 1, 3, 2, 4).reshape(times, height, width).sum(dim=0)
    return None
