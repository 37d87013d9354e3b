"""A headless Chromium, driven over a pipe in its own protocol (DevTools); no library needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, "Tab": 9, "Enter": 13}
_PATIENCE = 60.0  # seconds until an answer must have come


class Browser:
    """One process. What pages store lies in ``profile`` and is there for the next process."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self.closed = False
        ours_in, theirs_out = _pipe()
        theirs_in, ours_out = _pipe()
        self._from, self._to = ours_in, ours_out
        null = os.open(os.devnull, os.O_RDWR)
        to = [(theirs_in, 3), (theirs_out, 4), (null, 0), (null, 1), (null, 2)]
        # Chromium reads commands from file descriptor 3 and answers on 4.
        self._pid = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, here, there) for here, there in to],
            setpgroup=0,
        )
        for each in (theirs_in, theirs_out, null):
            os.close(each)
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before are kept."""
        self._number += 1
        sent: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            sent["sessionId"] = session
        os.write(self._to, json.dumps(sent).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, method: str) -> dict[str, Any]:
        """The first event of a kind, among those that came and those to come."""
        while True:
            for place, event in enumerate(self.events):
                if event.get("method") == method:
                    return dict(self.events.pop(place)["params"])
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(until - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            read = os.read(self._from, 1 << 20)
            assert read, "the browser is gone"
            self._rest += read
        one, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(one))

    def open(
        self, page: Path, *, width: int = 1280, height: int = 800, touch: bool = False
    ) -> Page:
        """A tab that shows a file, once it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Page(self, session)
        for domain in ("Page", "Runtime", "Network"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height, touch=touch)
        tab.go(page)
        return tab

    def downloads_to(self, folder: Path) -> None:
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(folder),
            eventsEnabled=True,
        )

    def close(self) -> None:
        """End the process as a user would, so that what pages stored is written."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        until = time.monotonic() + 20
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.killpg(self._pid, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._from)
        os.close(self._to)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self._session, **params)

    def close(self) -> None:
        self.call("Page.close")

    def go(self, page: Path) -> None:
        self.browser.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.browser.wait_for("Page.loadEventFired")

    def evaluate(self, code: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, name: str) -> str:
        return str(self.evaluate(f"document.getElementById({name!r}).textContent")).strip()

    def key(self, name: str) -> None:
        """Press a key: a letter, or a name such as ``ArrowLeft``."""
        code = _CODES.get(name, ord(name.upper()) if len(name) == 1 else 0)
        what = {"key": name, "windowsVirtualKeyCode": code}
        if len(name) == 1:
            what["text"] = name
        self.call("Input.dispatchKeyEvent", type="keyDown", **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def type(self, words: str) -> None:
        self.call("Input.insertText", text=words)

    def _middle(self, selector: str) -> tuple[float, float]:
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'nearest'}})")
        box = self.evaluate(
            f"(r => [r.x, r.y, r.width, r.height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        return box[0] + box[2] / 2, box[1] + box[3] / 2

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector: str) -> None:
        x, y = self._middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def colours(self, scheme: str) -> None:
        """``light`` or ``dark``."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file in an input element."""
        element = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        object_id = element["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=object_id)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        made = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(made["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe whose ends lie above the file descriptors that the browser is given."""
    import fcntl  # not on Windows

    ends = os.pipe()
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in ends]
    for each in ends:
        os.close(each)
    return high[0], high[1]
