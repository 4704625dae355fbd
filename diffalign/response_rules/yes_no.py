"""Yes or no in a free response, as POPE reads it.

Source: Li et al. 2023, Evaluating object hallucination in large vision-language models,
arXiv:2305.10355; parsing as in their released `evaluate.py` (RUCAIBox/POPE).
"""

from __future__ import annotations

from typing import Literal

YesNo = Literal["yes", "no"]

_NEGATIONS = {"No", "not", "no"}


def parse_response(response: str) -> YesNo:
    """Yes or no from a free response.

    Only what is before the first full stop counts, without commas; it is a no if one of its
    words is `No`, `not` or `no`, spelt just so, and everything else is a yes.

    Source: released `evaluate.py`.
    """
    words = response.partition(".")[0].replace(",", "").split(" ")
    return "no" if _NEGATIONS & set(words) else "yes"


def says(response: str) -> YesNo | None:
    """Yes or no in words of either spelling; None where a response says neither.

    `parse_response` calls those a yes too, and with them the ones that say no in other letters than
    its own three, such as `NO`: both are counted apart.
    """
    words = set(response.partition(".")[0].replace(",", "").lower().split())
    if words & {"no", "not"}:
        return "no"
    return "yes" if "yes" in words else None
