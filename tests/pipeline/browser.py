"""Chromium without a screen, driven by its own protocol (DevTools over a web socket): a page's DOM, errors and looks."""

import base64
import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.requirements import CHROMIUM, program

PROGRAM = program(*CHROMIUM)
SECONDS = 300.0


class Browser:
    """A headless Chromium of its own; `errors` has what scripts threw and what was logged as an error."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        flags += [
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
        ]
        self._log = folder / "chromium.log"
        folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([PROGRAM, *flags, "about:blank"], stdout=log, stderr=log, start_new_session=True)
        self._socket: ClientConnection | None = None
        self._number = 0
        self.thrown: list[str] = []
        self.logged: list[str] = []

    def __enter__(self) -> "Browser":
        port = self._until(lambda: re.search(r"DevTools listening on ws://[^:]+:(\d+)/", self._log.read_text())).group(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        self._socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **params: Any) -> Any:
        """Call the protocol; what the page has said meanwhile is kept."""
        assert self._socket is not None
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.thrown.append(json.dumps(params["exceptionDetails"])[:2000])
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.logged.append(json.dumps(params["entry"])[:2000])
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.logged.append(json.dumps(params["args"])[:2000])

    def open(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Go to a page at this size; what the one before has said is forgotten."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )
        self.thrown.clear()
        self.logged.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until the expression is true."""
        self._until(lambda: self.ask(expression), expression)

    def picture(self, path: Path) -> None:
        """Write the whole page as PNG."""
        height = min(int(self.ask("document.documentElement.scrollHeight")), 12_000)
        width = int(self.ask("innerWidth"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _until(self, look: Any, what: str = "") -> Any:
        until = time.monotonic() + SECONDS
        while not (found := look()):
            assert self.process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < until, f"not within {SECONDS:.0f} s: {what}"
            time.sleep(0.2)
        return found
