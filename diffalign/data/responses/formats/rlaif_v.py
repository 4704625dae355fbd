"""RLAIF-V: an image, a question and two responses as plain text.

Columns are those of openbmb/RLAIF-V-Dataset: `image` ({bytes, path}), `question`, `chosen`,
`rejected`, and `ds_name`, `origin_dataset`, `origin_split`, `idx`, `image_path`, which are not
read.

Source: Yu et al. 2024, arXiv:2405.17220.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, turns_of
from diffalign.data.responses.formats.base import AbstractMapping


class RLAIFV(AbstractMapping):
    """`image`, `question`, `chosen`, `rejected`."""

    needs: ClassVar[frozenset[str]] = frozenset({"question", "chosen", "rejected"})
    image_columns: ClassVar[tuple[str, ...]] = ("image", "images")
    summary: ClassVar[str] = "prompt from question"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {side: values[side] for side in self.responses}
        return [compared(turns_of(values["question"]), sides)]
