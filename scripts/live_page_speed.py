"""How smooth the live page is with a large pool, in headless Chromium.

    python -m scripts.live_page_speed [INSTANCES REQUESTS SECONDS]

The pool is made up (``tests.frontend.live_incident``); page and browser are real. Printed are the
times between two pictures of the page, and how much of a core its work takes. A machine that is
busy with other things makes the first worse, and the second hardly.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from scripts.screenshots import DESKTOP, browser, chromium_path, opened, served
from tests.frontend.live_incident import Incident

DEFAULTS = (200, 5000, 20)
SETTLE_S = 5.0
WATCH = """
window.gaps = []; window.long_tasks = [];
let last = performance.now();
const tick = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(tick); };
requestAnimationFrame(tick);
new PerformanceObserver((list) => { for (const e of list.getEntries()) window.long_tasks.push(e.duration); })
  .observe({ entryTypes: ["longtask"] });
"""  # noqa: E501
KEPT = ("TaskDuration", "ScriptDuration", "LayoutDuration", "RecalcStyleDuration")


async def measure(num_instances: int, num_requests: int, seconds: float) -> dict[str, Any]:
    """Figures of the page, in milliseconds and shares of a core."""
    incident = Incident(num_instances, num_requests)
    async with served(incident) as url, browser() as chromium:
        page = await opened(chromium, url, DESKTOP)
        await asyncio.sleep(SETTLE_S)
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable")
        await page.evaluate(WATCH)
        before = await _metrics(session)
        await asyncio.sleep(seconds)
        after = await _metrics(session)
        gaps = sorted(await page.evaluate("window.gaps.slice(1)"))
        long_tasks = sorted(await page.evaluate("window.long_tasks"))
        shown = await page.evaluate("state.frame.requests.length")
    passed_s = after["Timestamp"] - before["Timestamp"]
    return {
        "instances": num_instances,
        "requests": shown,
        "pictures_a_second": len(gaps) / seconds,
        "gap_p50_ms": gaps[len(gaps) // 2],
        "gap_p99_ms": gaps[int(0.99 * len(gaps))],
        "gap_longest_ms": gaps[-1],
        "long_tasks": len(long_tasks),
        "longest_task_ms": long_tasks[-1] if long_tasks else 0.0,
        **{f"{name}_share": (after[name] - before[name]) / passed_s for name in KEPT},
    }


async def _metrics(session: Any) -> dict[str, float]:
    told = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in told["metrics"]}


if __name__ == "__main__":
    if chromium_path() is None:
        sys.exit("Chromium is not installed: apt-get install chromium, or your system's package")
    asked = [int(argument) for argument in sys.argv[1:]]
    instances, requests, duration_s = (*asked, *DEFAULTS[len(asked) :])
    print(json.dumps(asyncio.run(measure(instances, requests, duration_s)), indent=1))
