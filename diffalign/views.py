"""Names of views: which response, which of its tokens, next to which images.

`chosen` is the preferred side with the images of the sample. `chosen@crop` is the same response
next to images under the condition `crop`, and `chosen:changed` counts its tokens by the weight map
`changed`; both together are `chosen:changed@crop`. Images under a denoiser have plain names only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PATTERN = re.compile(rf"({_NAME})(?::({_NAME}))?(?:@({_NAME}))?")


@dataclass(frozen=True)
class View:
    """A parsed name of a view."""

    response: str
    """What is compared: `chosen`, `rejected`, or another response of the sample."""
    weights: str | None = None
    """The weight map of its tokens; None counts every token once."""
    condition: str | None = None
    """What the images were put through; None leaves them as they are."""

    @classmethod
    def parse(cls, name: str) -> View:
        """Read `response[:weights][@condition]`.

        Raises:
            ValueError: the name has another form.
        """
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} names no view: write response, response@condition, response:weights or "
                f"response:weights@condition, for example chosen@crop"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        weights = f":{self.weights}" if self.weights else ""
        condition = f"@{self.condition}" if self.condition else ""
        return f"{self.response}{weights}{condition}"
