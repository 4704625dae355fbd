"""RLHF-V: an image, and a JSON string with the question, the corrected and the original response.

Columns are those of openbmb/RLHF-V-Dataset: `image` ({bytes, path}), `text` (a JSON object of
`question`, `chosen`, `rejected`, as a string), and some about the origin, which are not read.

Source: Yu et al. 2023, arXiv:2312.00849.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, malformed, turns_of
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError
from diffalign.parsing import parse_json

_FIELDS = ("question", "chosen", "rejected")


class RLHFV(AbstractMapping):
    """`image`, and `text` with JSON in it."""

    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    image_columns: ClassVar[tuple[str, ...]] = ("image", "images")
    summary: ClassVar[str] = "question, chosen and rejected from the JSON in text"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        try:
            _fields(first["text"])
        except UnusableRowError:
            return False
        return True

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        fields = _fields(values["text"])
        sides = {side: fields[side] for side in self.responses}
        return [compared(turns_of(fields["question"]), sides)]


def _fields(text: Any) -> Mapping[str, Any]:
    try:
        fields = parse_json(text, "text") if isinstance(text, (str, bytes)) else text
    except DataError as error:
        raise malformed(str(error)) from error
    if not isinstance(fields, Mapping) or not set(_FIELDS) <= set(fields):
        raise malformed(f"text has not the fields {', '.join(_FIELDS)}: {text!r:.60}")
    return fields
