"""Pictures of the live page during a scripted incident, and a short animation of migrations.

    python -m scripts.screenshots FOLDER

The pool is made up (``tests.frontend.live_incident``), the page and the browser are real: Chromium
is found on the path. Pictures: an instance crowded, one being drained, one gone; desktop and phone.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright

from tests.frontend.live_incident import Incident, app_of

# Seconds into the incident -> what the picture shows.
MOMENTS = {6.5: "crowded", 14.0: "drained", 20.5: "gone"}
DESKTOP, PHONE = {"width": 1280, "height": 760}, {"width": 390, "height": 844}
ANIMATED_FROM_S, NUM_FRAMES, FRAME_S = 8.0, 36, 0.09
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str | None:
    """The browser of this machine, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.asynccontextmanager
async def served(incident: Incident) -> AsyncIterator[str]:
    """The address of the page over the incident."""
    config = uvicorn.Config(app_of(incident), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  (it has no event to wait for)
        await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/llumsched/"
    finally:
        server.should_exit = server.force_exit = True
        await serving


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Headless Chromium."""
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(
            executable_path=chromium_path(), args=CHROMIUM_FLAGS
        )
        try:
            yield found
        finally:
            await found.close()


async def opened(chromium: Browser, url: str, viewport: Any, scheme: Any = "dark") -> Page:
    """The page, once it shows the pool."""
    page = await chromium.new_page(viewport=viewport, color_scheme=scheme)
    await page.goto(url)
    await page.wait_for_selector(".inst canvas")
    return page


async def pictures(folder: Path) -> None:
    """Write them all."""
    incident = Incident(6, 90)
    async with served(incident) as url, browser() as chromium:
        desktop = await opened(chromium, url, DESKTOP)
        phone = await opened(chromium, url, PHONE, "light")
        frames: list[Image.Image] = []
        for moment_s, name in MOMENTS.items():
            if moment_s > ANIMATED_FROM_S and not frames:
                await asyncio.sleep(max(0.0, ANIMATED_FROM_S - incident.seconds()))
                frames = await _filmed(desktop)
            await asyncio.sleep(max(0.0, moment_s - incident.seconds()))
            for page, suffix in ((desktop, ""), (phone, "-phone")):
                picture = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
                picture.quantize(128).save(folder / f"{name}{suffix}.png", optimize=True)
        frames[0].save(
            folder / "migrations.gif",
            save_all=True,
            append_images=frames[1:],
            duration=int(1000 * FRAME_S),
            loop=0,
            optimize=True,
        )


async def _filmed(page: Page) -> list[Image.Image]:
    frames = []
    for _ in range(NUM_FRAMES):
        picture = Image.open(io.BytesIO(await page.screenshot()))
        small = picture.convert("RGB").resize((800, 475))
        frames.append(small.quantize(64))
        await asyncio.sleep(FRAME_S / 3)
    return frames


if __name__ == "__main__":
    if chromium_path() is None:
        sys.exit("Chromium is not installed: apt-get install chromium, or your system's package")
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    asyncio.run(pictures(Path(sys.argv[1])))
