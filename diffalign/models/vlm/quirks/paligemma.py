"""PaliGemma 1 and 2: all tokens of image and prompt see each other, whatever a layer's window is;
those of a response see what comes before them.

Its processor marks prompts in `token_type_ids`, and is given no response here: what follows a
prompt would count as more of it, and see the response that it is to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.processing_utils import ProcessorMixin

from diffalign.models.vlm.quirks.base import AbstractFamily

_PROMPT = 0


class PaliGemma(AbstractFamily):
    """PaliGemma, on Gemma or on Gemma 2."""

    sees_ahead = True
    blocks_within_window = False
    masks_go_around = True

    @property
    def name(self) -> str:
        return "PaliGemma"

    def blocks(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else torch.where(types == _PROMPT, 0, -1)

    def token_inputs(
        self, further: Mapping[str, Tensor], response_mask: Tensor
    ) -> Mapping[str, Tensor]:
        return {"token_type_ids": response_mask.long()}

    def processor(self, processor: Any) -> Any:
        """Leave the begin of the sequence and the line break after a prompt to the chat template,
        and take text alone; by itself it puts both into any text, and asks for an image."""
        kind = type(processor)
        if not hasattr(ProcessorMixin, "prepare_inputs_layout"):
            return processor  # of transformers before 5: responses are refused by what reads them
        processor.__class__ = type(
            kind.__name__,
            (kind,),
            {
                "prepare_inputs_layout": ProcessorMixin.prepare_inputs_layout,
                "validate_inputs": ProcessorMixin.validate_inputs,
                "__module__": kind.__module__,
            },
        )
        return processor
