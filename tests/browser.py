"""A Chromium of this system, driven by Playwright, for tests of pages; skipped without one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def opened(address: str, **context: Any) -> Iterator[Any]:
    """A tab that shows a page. On leaving, no script has failed, and nothing was asked of anybody
    but the disk, and the server of the page itself.

    Args:
        address: of the page.
        context: of Playwright, such as `color_scheme` and `viewport`.
    """
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = next((found for name in NAMES if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"there is no browser here: {', '.join(NAMES)}")
    own = ("file:", "data:") if address.startswith("file:") else ("data:", _site(address))
    left: list[str] = []
    failed: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            tab = browser.new_context(**context).new_page()
            tab.set_default_timeout(120_000)
            tab.on("request", lambda r: None if r.url.startswith(own) else left.append(r.url))
            tab.on("pageerror", lambda error: failed.append(str(error)))
            tab.on("console", lambda m: failed.append(m.text) if m.type == "error" else None)
            tab.goto(address)
            yield tab
        finally:
            browser.close()
    assert left == [] and failed == []


def _site(address: str) -> str:
    return "/".join(address.split("/")[:3]) + "/"
