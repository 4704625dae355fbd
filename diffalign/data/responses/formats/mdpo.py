"""mDPO's 10,000 pairs of VLFeedback: a prompt that is templated already, and two responses.

Fields are those of fwnlp/mDPO-preference-data: `img_path`, `prompt` ("A chat between ... USER:
<image> ... ASSISTANT:"), `chosen`, `rejected`. The template is taken off: the model that is
trained brings its own.

Source: Wang et al. 2024, arXiv:2406.11839.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, turns_of_template
from diffalign.data.responses.formats.base import AbstractMapping


class MDPO(AbstractMapping):
    """`img_path`, `prompt`, `chosen`, `rejected`."""

    needs: ClassVar[frozenset[str]] = frozenset({"prompt", "chosen", "rejected", "img_path"})
    image_columns: ClassVar[tuple[str, ...]] = ("img_path",)
    summary: ClassVar[str] = "prompt from prompt without its template"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {side: values[side] for side in self.responses}
        return [compared(turns_of_template(values["prompt"]), sides)]
