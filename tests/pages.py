"""Pages opened in a real browser: what they ask for, what goes wrong in them, what their elements say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRAWN = """[...document.querySelectorAll('[data-figure]')].every(e => e.querySelector('.main-svg'))
    && document.readyState === 'complete'"""


@dataclass(frozen=True)
class Look:
    """A page on a screen: how wide, light or dark, and expressions of JavaScript whose values are wanted."""

    path: Path
    width: int = 1200
    scheme: str = "light"
    asked: Sequence[str] = ()


@dataclass
class Seen:
    """What came of a look."""

    problems: list[str] = field(default_factory=list)
    """Errors, and requests that leave the file."""
    answers: list[Any] = field(default_factory=list)
    charts: int = 0
    overflow: int = 0
    """Pixels by which the page is wider than the screen."""


def look_at(browser: str, *looks: Look) -> list[Seen]:
    """Look at pages one after the other, in one start of the browser."""
    return asyncio.run(_look_at(browser, looks))


async def _look_at(browser: str, looks: Sequence[Look]) -> list[Seen]:
    import choreographer

    async with choreographer.Browser(path=browser, headless=True) as chrome:
        return [await _seen(await chrome.create_tab("about:blank"), look) for look in looks]


async def _seen(tab: Any, look: Look) -> Seen:
    seen = Seen()
    own = look.path.as_uri()

    async def note(message: Any) -> None:
        url = message["params"].get("request", {}).get("url")
        if url is None or (url != own and not url.startswith("data:")):
            seen.problems.append(str(message["params"])[:300])

    for event in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.requestWillBeSent"):
        tab.subscribe(event, note)
    for domain in ("Runtime", "Log", "Network", "Page"):
        await tab.send_command(f"{domain}.enable")
    size = {"width": look.width, "height": 800, "deviceScaleFactor": 1, "mobile": look.width < 600}
    await tab.send_command("Emulation.setDeviceMetricsOverride", params=size)
    media = {"features": [{"name": "prefers-color-scheme", "value": look.scheme}]}
    await tab.send_command("Emulation.setEmulatedMedia", params=media)
    await tab.send_command("Page.navigate", params={"url": own})
    for _ in range(200):
        await asyncio.sleep(0.1)
        # The script of the page draws as it is read: before it there is nothing that could be drawn.
        if await _value(tab, f"location.href !== 'about:blank' && {DRAWN}"):
            break
    seen.charts = await _value(
        tab,
        "document.querySelectorAll('[data-figure] .main-svg').length > 0 ? "
        "document.querySelectorAll('[data-figure]').length : 0",
    )
    seen.answers = [await _value(tab, expression) for expression in look.asked]
    # A phone widens its viewport to hold what overflows, so innerWidth is no measure.
    seen.overflow = max(0, await _value(tab, "document.documentElement.scrollWidth") - look.width)
    return seen


async def _value(tab: Any, expression: str) -> Any:
    """The value of an expression of JavaScript, a promise's when it is kept."""
    asked = {"expression": f"(async () => JSON.stringify(await ({expression})))()", "awaitPromise": True}
    answer = (await tab.send_command("Runtime.evaluate", params=asked))["result"]
    if "exceptionDetails" in answer:
        raise AssertionError(answer["exceptionDetails"]["exception"].get("description"))
    value = answer["result"].get("value")
    return None if value is None else json.loads(value)
