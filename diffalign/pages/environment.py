"""The templates of every page: text is escaped, nothing is fetched, only our own scripts run.

    write_atomically(path, render("sections.html", title="Base against aligned", sections=...))

A page extends `base.html` and fills its blocks `head`, `heading` and `body`. Colours, spacing,
light and dark, and narrow screens are in `style.css`, which every page carries within it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffalign.imaging.image_files import PIXEL_ART, data_uri

FOLDER = Path(__file__).parent / "templates"

_POLICY = {
    "default-src": "'none'",
    "img-src": "data:",
    "style-src": "'unsafe-inline'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
"""Nothing is fetched and nothing is run, whatever a name or a prompt smuggles into a page."""


SHOWS_FILES: Mapping[str, str] = {"img-src": "'self' file: data:"}
"""What a page is allowed that shows images of files next to it."""


def render(
    template: str,
    *,
    scripts: tuple[str, ...] = (),
    allow: Mapping[str, str] | None = None,
    **values: Any,
) -> str:
    """A whole page.

    Args:
        template: its name; it extends `base.html`.
        scripts: names of scripts next to the templates, which the page carries and runs: these and
            no others, for the policy of the page names their digests.
        allow: further directives of the page's policy, or others than those that refuse everything,
            such as `{"img-src": "'self' data:"}` of a page that a server of ours shows.
        values: of the template; text is escaped, and only `Markup` passes unchanged. `title` is
            the heading and the browser's title, `lead` the sentence under it.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    texts = [Markup((FOLDER / name).read_text(encoding="utf-8")) for name in scripts]
    policy = {**_POLICY, **(allow or {})}
    if texts:
        policy["script-src"] = " ".join(map(_digest, texts))
    return (
        _environment()
        .get_template(template)
        .render(
            {"lead": "", "above": "", **values},
            policy="; ".join(f"{name} {value}" for name, value in policy.items()),
            scripts=texts,
        )
    )


def part(name: str, *values: Any, of: str = "parts.html") -> Markup:
    """The markup that a macro of a template makes of some values."""
    macros: Any = _environment().get_template(of).module
    return Markup(getattr(macros, name)(*values))


def _digest(script: str) -> str:
    """How a content security policy names a script that stands in the page."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["data_uri"] = data_uri
    made.globals["PIXEL_ART"] = PIXEL_ART
    return made
