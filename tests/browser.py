"""A real browser for tests: Chromium without a window, by the DevTools protocol over a pipe, so that no port is open.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, where Chromium's sandbox does not start
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1400,1000",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0


def program() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Browser:
    """One tab.

    Attributes:
        asked: the addresses of all requests so far.
        said: what pages wrote to the console, errors and refusals of the content security policy included.
    """

    _into: int
    _out: int
    _session: str = ""
    _number: int = 0
    _rest: bytes = b""
    _loaded: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE
        while True:
            found = self._next(end)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self._note(found)

    def open(self, address: str) -> None:
        """Open a page and wait until it is loaded."""
        loader = self.call("Page.navigate", url=address)["loaderId"]
        end = time.monotonic() + _PATIENCE
        while loader not in self._loaded:
            self._note(self._next(end))

    def run(self, script: str) -> Any:
        """The value of an expression in the page; it may be a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{script} did not become true; the console said {self.said}")

    def follow(self, script: str) -> None:
        """Do what leads to another page, and wait until that is loaded."""
        self.run(f"window.left = false; {script}; true")
        self.until("window.left === undefined && document.readyState === 'complete'")

    def click(self, point: tuple[float, float]) -> None:
        """Click as a person does, and wait until another page is loaded."""
        self.run("window.left = false; true")
        for kind in ("mousePressed", "mouseReleased"):
            x, y = point
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.until("window.left === undefined && document.readyState === 'complete'")

    def painted(self) -> None:
        """Wait until what was drawn so far is on the screen."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw with the left button from one point of the page to another."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self) -> bytes:
        """The page as it looks now, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def text(self) -> str:
        """What a person reads."""
        return str(self.run("document.body.innerText"))

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _note(self, found: dict[str, Any]) -> None:
        method, given = found.get("method", ""), found.get("params", {})
        if method == "Page.lifecycleEvent" and given["name"] == "load":
            self._loaded.add(given["loaderId"])
        if method == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])
        if method == "Log.entryAdded":
            self.said.append(given["entry"]["text"])
        if method in {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"}:
            self.said.append(json.dumps(given)[:500])

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._out, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which goes with it."""
    name = program()
    assert name is not None, "there is no Chromium on this machine"
    theirs_in, ours_in = os.pipe()
    ours_out, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", command, "bash", name, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            tab = Browser(ours_in, ours_out)
            tab._attach()
            yield tab
        finally:
            os.close(ours_in)
            os.close(ours_out)
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Chromium ends by itself when its pipe closes; what has not after a while is ended, children included."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
