"""Pages looked at in a browser, at the widths of a phone, a tablet and a desk."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

needs_a_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None
    or not (shutil.which("chromium") or shutil.which("chromium-browser")),
    reason="needs playwright, and Chromium on the path",
)


def look_at(path: Path, check: Callable[[Any], Awaitable[None]]) -> None:
    """Open a page at each width, where it raises no error, and nothing is wider than the window.

    Args:
        check: looks at what is shown, given the page of playwright.
    """
    from scripts.screenshots import browser

    async def look(width: int) -> None:
        async with browser() as chromium:
            page = await chromium.new_page(viewport={"width": width, "height": 900})
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            await page.goto(path.as_uri())
            await check(page)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert not errors

    async def scenario() -> None:
        for width in (390, 768, 1280):
            async with asyncio.timeout(60):
                await look(width)

    asyncio.run(scenario())
