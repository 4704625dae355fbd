"""OPA-DPO: a response of the model, the same one rewritten by GPT-4V, and that of the data set.

Columns are those of the authors' sets: `queries`, `image_bytes` (base64), `standard_response` (the
data set's response, here `chosen`), `original_generate_response` (the model's own, here
`rejected`), `AI_pseudo_response` (rewritten, here `revised`) and `AI_json_report`, a JSON string.
The report has one entry a sentence under "0", "1", ..., and `Added` for what was added:
`copied_content`, `rewritten_content`, `score` (1 to 4) and `error_type`. Each sentence that is
found in `rejected` or `revised` becomes a span with that score, and the error type as its label;
text that was added, or that the report does not quote as it is, becomes one without either.

Source: Yang et al. 2025, arXiv:2501.09695; zhyang2226/OPA-DPO, utils/data_utils_dpo.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffalign.data.responses.conversation import (
    Comparison,
    compared,
    locate_parts,
    malformed,
    turns_of_template,
)
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.records import Span
from diffalign.errors import DataError
from diffalign.parsing import parse_json

_COLUMNS = {
    "chosen": "standard_response",
    "rejected": "original_generate_response",
    "revised": "AI_pseudo_response",
}
_QUOTED = {"rejected": "copied_content", "revised": "rewritten_content"}


class OPADPO(AbstractMapping):
    """`queries`, `image_bytes`, three responses and a report on two of them."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "AI_json_report", *_COLUMNS.values()})
    image_columns: ClassVar[tuple[str, ...]] = ("image_bytes", "image")
    responses: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "revised")
    summary: ClassVar[str] = (
        f"prompt from queries, {', '.join(f'{name} from {c}' for name, c in _COLUMNS.items())}, "
        "scores of sentences from AI_json_report"
    )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        report = _report(values["AI_json_report"])
        responses = {name: values[column] for name, column in _COLUMNS.items()}
        found = compared(turns_of_template(values["queries"]), responses)
        spans = {
            name: _spans(found.responses[name], report, quoted) for name, quoted in _QUOTED.items()
        }
        return [replace(found, spans=spans)]


def _report(text: Any) -> list[Mapping[str, Any]]:
    """The entries on sentences, in order."""
    try:
        report = parse_json(text, "AI_json_report") if isinstance(text, (str, bytes)) else text
    except DataError as error:
        raise malformed(str(error)) from error
    if not isinstance(report, Mapping):
        raise malformed(f"AI_json_report is no JSON object: {text!r:.60}")
    return [
        {str(key).replace(" ", "_"): value for key, value in entry.items()}
        for name, entry in report.items()
        if str(name).isdecimal() and isinstance(entry, Mapping)
    ]


def _spans(text: str, report: Sequence[Mapping[str, Any]], quoted: str) -> tuple[Span, ...]:
    """The quoted sentences with their scores, and the text between them without one."""
    spans: list[Span] = []
    after = 0
    places = locate_parts(text, [str(entry.get(quoted) or "") for entry in report])
    for place, entry in zip(places, report, strict=True):
        if place is not None:
            spans += _unjudged(text, after, place[0])
            spans.append(
                Span(start=place[0], end=place[1], label=_label(entry), score=_score(entry))
            )
            after = place[1]
    return (*spans, *_unjudged(text, after, len(text)))


def _unjudged(text: str, start: int, end: int) -> list[Span]:
    return [Span(start=start, end=end)] if text[start:end].strip() else []


def _label(entry: Mapping[str, Any]) -> str | None:
    label = entry.get("error_type")
    return None if label is None else str(label)


def _score(entry: Mapping[str, Any]) -> float | None:
    try:
        return float(entry["score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
