"""A headless Chromium for the tests of pages: opens a file and tells what it logged, asked for and shows."""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "about:blank",
]

OVERFLOW = """
(() => { const wide = document.documentElement.scrollWidth - window.innerWidth; const out = [];
  if (wide > 0) out.push(`page is ${wide} px too wide`);
  for (const e of document.querySelectorAll('h1,h2,p,figcaption,.tile b,.tile span,.bars span,.bars b')) {
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
      out.push(`${e.tagName}: ${e.textContent.slice(0, 40)}`); }
  return out; })()
"""


VIEWS = tuple((width, dark) for width in (1280, 390) for dark in (False, True))
"""A desk and a phone, light and dark."""

LIMIT = 10_000_000

RAW = re.compile(
    r"\b(?:None|nan|True|False)\b|[{}\ufffd]|(?<![\d,.])1\s(?:crops|classes|images|shards|steps|jigsaws|times)\b"
)
"""What a program would say, and a reader should not see."""


@dataclass
class Seen:
    """What a browser saw of a page in one view."""

    width: int
    dark: bool
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow: list[str] = field(default_factory=list)
    text: str = ""
    screenshot: bytes = b""


async def _look(page: Path, binary: str) -> list[Seen]:
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            for _ in range(300):
                if port_file.exists() and port_file.read_text().strip():
                    break
                await asyncio.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    targets = await answer.json(content_type=None)
                address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
                async with session.ws_connect(address, max_msg_size=1 << 28) as socket:
                    return await _visit(socket, page)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                shutil.rmtree(profile, ignore_errors=True)
                Path(profile).mkdir(exist_ok=True)


async def _visit(socket: Any, page: Path) -> list[Seen]:
    counter = 0
    loaded = asyncio.Event()
    waiting: dict[int, asyncio.Future[Any]] = {}
    views: list[Seen] = []

    async def read() -> None:
        async for message in socket:
            event = json.loads(message.data)
            if "id" in event:
                waiting.pop(event["id"]).set_result(event.get("result", {}))
            elif event["method"] == "Page.loadEventFired":
                loaded.set()
            elif event["method"] == "Runtime.exceptionThrown":
                views[-1].errors.append(str(event["params"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                views[-1].errors.append(event["params"]["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith(("data:", "chrome:", "about:")):
                    views[-1].requests.append(url)

    async def call(method: str, **parameters: Any) -> Any:
        nonlocal counter
        counter += 1
        waiting[counter] = asyncio.get_running_loop().create_future()
        answer = waiting[counter]
        await socket.send_json({"id": counter, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, 60)

    reader = asyncio.create_task(read())
    for width, dark in VIEWS:
        views.append(seen := Seen(width, dark))
        if len(views) == 1:
            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
        loaded.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await call("Emulation.setEmulatedMedia", features=scheme)
        await call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        await call("Page.navigate", url=page.resolve().as_uri())
        await asyncio.wait_for(loaded.wait(), 60)
        await asyncio.sleep(0.2)
        evaluated = await call("Runtime.evaluate", expression=OVERFLOW, returnByValue=True)
        seen.overflow = evaluated["result"]["value"]
        evaluated = await call("Runtime.evaluate", expression="document.body.innerText", returnByValue=True)
        seen.text = evaluated["result"]["value"]
        shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
        seen.screenshot = base64.b64decode(shot["data"])
    reader.cancel()
    return views


def look(page: Path) -> list[Seen]:
    """Open a local page in headless Chromium, once per view; the test is skipped, saying so, where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no headless Chromium on this machine (Debian: apt-get install chromium)")
    return asyncio.run(_look(page, binary))


def check_page(page: Path, *texts: str) -> None:
    """No error, no request but the page itself, nothing clipped, the texts shown, in each view; no program's words."""
    assert page.stat().st_size < LIMIT
    for seen in look(page):
        view = f"{seen.width} px, {'dark' if seen.dark else 'light'}"
        assert (seen.errors, seen.overflow) == ([], []), view
        assert [url for url in seen.requests if not url.startswith("file:")] == [], view
        assert len(seen.requests) == 1, view
        assert [text for text in texts if text not in seen.text] == [], view
        assert RAW.findall(seen.text) == [], view
