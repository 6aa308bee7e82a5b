"""A real browser for the pages: Chromium without a window, driven by its own protocol over a pipe, without a package.

https://chromedevtools.github.io/devtools-protocol describes the commands.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers; the pages are our own
    "--use-angle=swiftshader",  # WebGL2 without a graphics card, for the viewer of the service's page
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE_S = 180.0
"""For an answer, and for what a page waits for; of a service on a busy machine that may be long."""
KEY_CODES = {
    "Tab": 9, "Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
_FIRST_FREE = 10
"""Descriptors from here on: those of the protocol, 3 and 4, must not be among the ones that are copied to them."""


class Browser:
    """One tab of Chromium.

    Attributes:
        complaints: what the console was told, errors and breaches of a page's policy included.
        requests: addresses that pages asked for.
    """

    def __init__(self, program: str, folder: Path) -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for end in (*os.pipe(), *os.pipe())]
        into, self._write, self._read, out = ends
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            env={**os.environ, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(into, 3), os.dup2(out, 4)),
            pass_fds=(3, 4),
        )
        os.close(into)
        os.close(out)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def open(
        self,
        page: Path | str,
        *,
        width: int,
        dark: bool = False,
        script: bool = True,
        height: int = 900,
        touch: bool = False,
    ) -> None:
        """Open a file or an address at a width and height in CSS pixels and wait until it is loaded."""
        # The page before may still ask a service that has ended, which is no complaint of this one.
        self._go("about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch, maxTouchPoints=2)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self._go(page.as_uri() if isinstance(page, Path) else page)

    def reload(self) -> None:
        """Load the page again and wait until it is loaded: before, the old one would answer, or none."""
        self._events.clear()
        self.call("Page.reload")
        self._wait_for_load()

    def _go(self, address: str) -> None:
        self._events.clear()
        self.call("Page.navigate", url=address)
        self._wait_for_load()

    def _wait_for_load(self) -> None:
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._receive())

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, for example "Tab" or "Enter"."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = KEY_CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
        known = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def until(self, expression: str, seconds: float = PATIENCE_S) -> Any:
        """Wait until a JavaScript expression gives something that counts as true, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"in vain: {expression}"
            time.sleep(0.05)
        return found

    def choose(self, element: str, *paths: Path) -> None:
        """Give files to a file input, as its dialog would."""
        node = self.call("Runtime.evaluate", expression=f"document.querySelector('{element}')")["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], objectId=node)

    def drop(self, element: str, *paths: Path) -> None:
        """Drag files or folders from outside over an element's middle and drop them there."""
        x, y = self.middle(element)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def touch(self, *moments: Sequence[tuple[float, float]]) -> None:
        """Put fingers on the page, move them through the moments (x and y of each finger, CSS pixels), lift them."""
        for number, moment in enumerate(moments):
            points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(moment)]
            self.call("Input.dispatchTouchEvent", type="touchMove" if number else "touchStart", touchPoints=points)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def middle(self, element: str) -> tuple[float, float]:
        """Return x and y of an element's middle in CSS pixels of the window."""
        x, y = self.value(
            f"(box => [box.left + box.width / 2, box.top + box.height / 2])"
            f"(document.querySelector('{element}').getBoundingClientRect())"
        )
        return float(x), float(y)

    def picture(self) -> bytes:
        """Return the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def print(self) -> bytes:
        """Return the page as a PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            got = os.read(self._read, 1 << 20) if ready else b""
            if not got:
                raise TimeoutError("Chromium does not answer")
            self._buffer += got
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, told = event.get("method", ""), event.get("params", {})
        if method in COMPLAINTS:
            self.complaints.append(json.dumps(told))
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
