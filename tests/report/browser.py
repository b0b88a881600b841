"""A page in headless Chromium, over the pipe of its DevTools protocol: no driver, no port.

Chromium is a package of the distribution; `find` says where it is. axe-core comes from npm:
`npm install axe-core`, with AXE_CORE naming the file axe.min.js.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def find() -> str | None:
    """Chromium's path, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of one Chromium.

    Attributes:
        said: whatever the page wrote to its console, or failed at.
    """

    def __init__(self, into: int, outof: int) -> None:
        self._into, self._outof = os.fdopen(into, "wb"), os.fdopen(outof, "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.said: list[str] = []
        self._loaded = False
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        self._into.write(json.dumps(request).encode() + b"\0")
        self._into.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._outof.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        method, said = answer.get("method", ""), answer.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(said)[:500])
        if method == "Network.requestWillBeSent" and "file:" not in said["request"]["url"]:
            self.said.append(f"asks for {said['request']['url'][:200]}")
        self._loaded |= method == "Page.loadEventFired"
        return answer

    def open(self, page: Path, *, width: int, dark: bool = False, styles: bool = True) -> None:
        """Load a file at a width of the window, CSS pixels."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media="", features=[feature])
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._ask("Page.setBypassCSP", enabled=True)  # for axe-core; the page's own is tested apart
        self._loaded = False
        self._ask("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._next()
        if not styles:
            self.run("document.querySelectorAll('style').forEach(one => one.remove())")

    def run(self, script: str) -> Any:
        """What an expression gives."""
        found = self._ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, *, height: int = 0) -> bytes:
        """A PNG of the whole page, or of its first `height` pixels."""
        width, whole = self.run(
            "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        box = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=box)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """The page on paper, as its own style says."""
        printed = self._ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(printed["data"])

    def close(self) -> None:
        self._into.close()
        self._outof.close()


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with a profile of its own in the folder `profile`."""
    path = find()
    assert path is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    environment = {**os.environ, "HOME": str(profile)}
    # Chromium reads descriptor 3 and writes descriptor 4. Pages here are our own files, and a
    # container offers no sandbox to root.
    command = (
        f'exec "$0" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run'
        f' --disable-background-networking --user-data-dir="$1" --remote-debugging-pipe'
        f" 3<&{theirs_in} 4>&{theirs_out}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command, path, str(profile)],
        pass_fds=(theirs_in, theirs_out),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    opened = Browser(ours_out, ours_in)
    try:
        yield opened
    finally:
        opened.close()
        process.terminate()
        process.wait(30)
