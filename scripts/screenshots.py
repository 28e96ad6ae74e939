"""Pictures of the live page during a scripted incident, and a short animation of migrations.

    python -m scripts.screenshots FOLDER

The pool is made up (``tests.frontend.live_incident``), the page and the browser are real: Chromium
is found on the path. Pictures: an instance crowded, requests leaving it, one instance drained, one
killed, one request's account; desktop and phone. The incident goes on by steps, the page's clock
with it, so the pictures are the same on a slow machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
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
MOMENTS = {7.0: "crowded", 10.0: "moving", 13.5: "drained", 19.0: "gone"}
DESKTOP, PHONE = {"width": 1280, "height": 760}, {"width": 390, "height": 844}
# What the page has seen when the incident begins, and how far its frames are apart then and later.
BEFORE_S, COARSE_S, STEP_S = 60.0, 1.5, 0.5
NIGHT = datetime.datetime(2026, 1, 1, 3, 0, tzinfo=datetime.UTC)
ANIMATED_S, FRAMES_A_STEP, ANIMATION_SIZE = (7.0, 11.0), 5, (820, 423)
ANIMATED: Any = {"x": 0, "y": 0, "width": 1280, "height": 660}
NUM_COLOURS = 160
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


async def opened(
    chromium: Browser,
    url: str,
    viewport: Any,
    scheme: Any = "dark",
    stepped: Incident | None = None,
) -> Page:
    """The page, once it shows the pool; with a clock that goes only by hand if the pool does."""
    page = await chromium.new_page(viewport=viewport, color_scheme=scheme)
    if stepped:
        await page.clock.install(time=NIGHT)
    await page.goto(url)
    while stepped and not await page.locator(".inst canvas").count():
        stepped.step(stepped.seconds())  # a frame that is made before it listens is not for it
        await asyncio.sleep(0.1)
    await page.wait_for_selector(".inst canvas")
    if stepped:
        await page.clock.pause_at(NIGHT + datetime.timedelta(minutes=1))
    return page


async def pictures(folder: Path) -> None:
    """Write them all."""
    incident = Incident(6, 128, is_stepped=True, from_s=-BEFORE_S)
    async with served(incident) as url, browser() as chromium:
        pages = {}
        for suffix, viewport, scheme in (("", DESKTOP, "dark"), ("-phone", PHONE, "light")):
            pages[suffix] = await opened(chromium, url, viewport, scheme, incident)
        desktop = pages[""]
        frames: list[Image.Image] = []
        for now_s in _moments():
            incident.step(now_s)
            for page in pages.values():
                await page.wait_for_function("(s) => state.frame.at_s >= s", arg=now_s, polling=20)
            is_animated = ANIMATED_S[0] <= now_s < ANIMATED_S[1]
            if now_s in MOMENTS:
                # Those that fly are on their way.
                await asyncio.gather(*(page.clock.run_for(300) for page in pages.values()))
                for suffix, page in pages.items():
                    await _save(page, folder / f"{MOMENTS[now_s]}{suffix}.png")
            for _ in range(FRAMES_A_STEP if is_animated else 1):
                ticks = int(1000 * STEP_S / (FRAMES_A_STEP if is_animated else 1))
                await asyncio.gather(*(page.clock.run_for(ticks) for page in pages.values()))
                if is_animated:
                    picture = Image.open(io.BytesIO(await desktop.screenshot(clip=ANIMATED)))
                    frames.append(_reduced(picture.convert("RGB").resize(ANIMATION_SIZE)))
        await desktop.evaluate("choose({ request: state.frame.requests.find((r) => r.moves).id })")
        await desktop.wait_for_function("state.told", polling=20)
        await _save(desktop, folder / "request.png")
        frames[0].save(
            folder / "migrations.gif",
            save_all=True,
            append_images=frames[1:],
            duration=int(1000 * STEP_S / FRAMES_A_STEP),
            loop=0,
            optimize=True,
        )


def _moments() -> list[float]:
    coarse = [-BEFORE_S + k * COARSE_S for k in range(1, int(BEFORE_S / COARSE_S) + 1)]
    return coarse + [k * STEP_S for k in range(1, int(max(MOMENTS) / STEP_S) + 1)]


async def _save(page: Page, path: Path) -> None:
    picture = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    _reduced(picture).save(path, optimize=True)


def _reduced(picture: Image.Image) -> Image.Image:
    """The picture in few colours: half are those it has most of, half are far from each other."""
    palette = Image.new("P", (1, 1))
    ways = (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)
    halves = [picture.quantize(NUM_COLOURS // 2, way).getpalette() or [] for way in ways]
    palette.putpalette([value for half in halves for value in half[: 3 * (NUM_COLOURS // 2)]])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


if __name__ == "__main__":
    if chromium_path() is None:
        sys.exit("Chromium is not installed: apt-get install chromium, or your system's package")
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    asyncio.run(pictures(Path(sys.argv[1])))
