"""A headless Chromium for the tests of pages: opens a file and tells what it logged, asked for and shows."""

import asyncio
import base64
import contextlib
import json
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


@dataclass
class Seen:
    """What a browser saw on one page."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow: list[str] = field(default_factory=list)
    text: str = ""
    screenshot: bytes = b""


async def _look(page: Path, width: int, dark: bool, binary: str) -> Seen:
    seen = Seen()
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
                    await _visit(socket, page, width, dark, seen)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                shutil.rmtree(profile, ignore_errors=True)
                Path(profile).mkdir(exist_ok=True)
    return seen


async def _visit(socket: Any, page: Path, width: int, dark: bool, seen: Seen) -> None:
    counter = 0
    loaded = asyncio.Event()
    waiting: dict[int, asyncio.Future[Any]] = {}

    async def read() -> None:
        async for message in socket:
            event = json.loads(message.data)
            if "id" in event:
                waiting.pop(event["id"]).set_result(event.get("result", {}))
            elif event["method"] == "Page.loadEventFired":
                loaded.set()
            elif event["method"] == "Runtime.exceptionThrown":
                seen.errors.append(str(event["params"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                seen.errors.append(event["params"]["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith(("data:", "chrome:", "about:")):
                    seen.requests.append(url)

    async def call(method: str, **parameters: Any) -> Any:
        nonlocal counter
        counter += 1
        waiting[counter] = asyncio.get_running_loop().create_future()
        answer = waiting[counter]
        await socket.send_json({"id": counter, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, 60)

    reader = asyncio.create_task(read())
    for domain in ("Page", "Runtime", "Log", "Network"):
        await call(f"{domain}.enable")
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    await call("Emulation.setEmulatedMedia", features=scheme)
    await call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    await call("Page.navigate", url=page.resolve().as_uri())
    await asyncio.wait_for(loaded.wait(), 60)
    await asyncio.sleep(0.3)
    evaluated = await call("Runtime.evaluate", expression=OVERFLOW, returnByValue=True)
    seen.overflow = evaluated["result"]["value"]
    evaluated = await call("Runtime.evaluate", expression="document.body.innerText", returnByValue=True)
    seen.text = evaluated["result"]["value"]
    shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
    seen.screenshot = base64.b64decode(shot["data"])
    reader.cancel()


def look(page: Path, width: int = 1280, dark: bool = False) -> Seen:
    """Open a local page in headless Chromium; the test is skipped, saying so, where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no headless Chromium on this machine (Debian: apt-get install chromium)")
    return asyncio.run(_look(page, width, dark, binary))
