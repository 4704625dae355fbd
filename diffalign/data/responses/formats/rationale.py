"""Pairs with a rationale: why the chosen response is better, in words, as a third response.

The columns are those of `trl`, and `rationale`. What a model learns to write it after is the
conversation, the chosen response, and the question why that is better than the rejected one: a
rationale is one of the preference, and not of either response. The loss is a term of a
`weighted_sum`: `sft` with `views: {chosen: rationale}`.

Source: Just et al. 2024, arXiv:2407.14477, whose loss adds the log-likelihood of the rationale
given the prompt and the preference. Their code (reds-lab/preference-learning-with-rationales) tells
the preference in one turn of the user, with the prompt and both responses; here the chosen one is
the model's own turn, so that image, prompt and chosen response are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, malformed
from diffalign.data.responses.formats.trl import TRL
from diffalign.data.responses.records import Turn

_WHY = "Why is this a better response than the following one?\n\n{rejected}"


class Rationale(TRL):
    """The columns of `trl`, and `rationale`."""

    needs: ClassVar[frozenset[str]] = TRL.needs | {"rationale"}
    responses: ClassVar[tuple[str, ...]] = (*TRL.responses, "rationale")
    summary: ClassVar[str] = f"{TRL.summary}, and why chosen is better from rationale"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        (pair,) = super().comparisons(values)
        said = values["rationale"]
        if not isinstance(said, str):
            raise malformed(f"rationale is no text: {said!r:.60}", "rationale")
        chosen, rejected = (pair.responses[side] for side in TRL.responses)
        turns = (
            *pair.contexts.get("chosen", pair.turns),
            Turn(role="assistant", text=chosen),
            Turn(role="user", text=_WHY.format(rejected=rejected)),
        )
        return [
            replace(
                pair,
                responses={**pair.responses, "rationale": said},
                contexts={**pair.contexts, "rationale": turns},
            )
        ]
