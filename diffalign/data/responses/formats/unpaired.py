"""Single responses, each labelled as desirable or not: what KTO, BCO and NPO train on.

TRL has `prompt`, `completion` and `label`; ms-swift `messages` and `label`; LLaMA-Factory
`messages` or `conversations`, and `kto_tag`. A label is true or false, 1 or 0. Images are those of
`images` or `image`, or are in the messages. A row without a label is left out.

Sources: https://huggingface.co/docs/trl/dataset_formats, "Unpaired preference";
https://swift.readthedocs.io, "Custom Dataset", KTO;
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, "KTO Dataset".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, malformed
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.formats.demonstrations import demonstrated, shows_one_response
from diffalign.data.skipping import LeftOut

_LABELS = ("label", "kto_tag")
_MEANS: Mapping[Any, bool] = {
    **dict.fromkeys((True, 1, "true", "1", "desirable"), True),
    **dict.fromkeys((False, 0, "false", "0", "undesirable"), False),
}


class Unpaired(AbstractMapping):
    """`prompt` and `completion`, or `messages` or `conversations`; and `label` or `kto_tag`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    images_optional: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    summary: ClassVar[str] = "one response a row, chosen where its label is true, else rejected"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        return shows_one_response(first) and any(name in first for name in _LABELS)

    def describe_needs(self) -> str:
        return (
            "prompt and completion, or messages, or conversations, or instruction and output; with "
            "label or kto_tag; and perhaps images (or image)"
        )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison | LeftOut]:
        label = next((values[name] for name in _LABELS if values.get(name) is not None), None)
        if label is None:
            return [LeftOut.UNLABELLED]
        desirable = _MEANS.get(label.strip().lower() if isinstance(label, str) else _plain(label))
        if desirable is None:
            raise malformed(f"a label is true or false, got {label!r:.60}")
        return [demonstrated(values, "chosen" if desirable else "rejected")]


def _plain(label: Any) -> Any:
    return label if isinstance(label, (int, float)) else None
