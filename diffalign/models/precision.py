"""Names of floating point formats, as every config writes them."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def precision_of(dtype: torch.dtype) -> Precision:
    """The name of one of `DTYPES`."""
    return next(name for name, named in DTYPES.items() if named == dtype)
