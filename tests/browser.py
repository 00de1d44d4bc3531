"""A headless Chromium for the tests of the page, spoken to over two pipes; no package needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
# The browser reads from 3 and writes to 4, wherever the pipes are here.
_LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab: opens a page, presses and asks things, takes pictures, keeps what went wrong."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, "no Chromium on this machine"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._send = os.pipe()
        self._receive, answers = os.pipe()
        flags = (
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-extensions", "--disable-background-networking",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}",
        )  # fmt: skip
        launch = (sys.executable, "-c", _LAUNCH, f"{commands}", f"{answers}", CHROMIUM)
        self._process = subprocess.Popen(
            [*launch, *flags, "about:blank"], pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._count, self._buffer, self._events = 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._send)
        os.close(self._receive)
        self._profile.cleanup()

    def call(self, method: str, **params: object) -> dict:
        """One command of the DevTools protocol and its answer; events meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next(60)).get("id") != self._count:
            self._events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select(
                [self._receive], [], [], max(0, deadline - time.monotonic())
            )
            assert ready, "the browser does not answer"
            self._buffer += os.read(self._receive, 1 << 20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self, page: Path, width: int = 1200, height: int = 900, *,
        dark: bool = False, still: bool = False, scripts: bool = True,
    ) -> None:  # fmt: skip
        """Load a page from its file, on a screen of a width and as a reader has it set."""
        self._events.clear()
        self.call("Emulation.setDeviceMetricsOverride",
                  width=width, height=height, deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next(60))

    def ask(self, expression: str) -> object:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key pressed and let go; it goes to whatever has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path | None = None, whole: bool = True) -> bytes:
        """A PNG of the page, all of it or what the screen shows."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png",
                         **({"clip": self._whole()} if whole else {}))["data"]  # fmt: skip
        png = base64.b64decode(data)
        if path is not None:
            path.write_bytes(png)
        return png

    def _whole(self) -> dict:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests that left the file."""
        found: list[str] = []
        for event in self._events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            if method == "Log.entryAdded":
                found.append(json.dumps(params["entry"]))
            if method == "Runtime.consoleAPICalled":
                found.append(json.dumps(params["args"]))
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [url] if not url.startswith(("file:", "data:")) else []
        return found
