"""Prompts for judges: our own wording, or a published one from a file."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import DataError
from diffalign.files import read_text


def read_template(path: Path | None, own: str) -> str:
    """The text of a template, or our own where no file is given."""
    if path is None:
        return own
    return read_text(path, absent="there is no such template")


def fill(template: str, **values: str) -> str:
    """Put values where their names stand in braces.

    A published template with plain `{}` takes them in the order in which they are given here.

    Raises:
        DataError: the template wants something else.
    """
    try:
        return template.format(*values.values(), **values)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"the template of the judge's prompt can be filled with {', '.join(values)} in braces, "
            f"and wants {error}; write braces that are meant as such twice"
        ) from error
