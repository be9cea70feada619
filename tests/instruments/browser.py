"""A headless Chromium, driven over its DevTools protocol through a pair of pipes.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON that ends with a zero byte, from the
browser on descriptor 4 and to it on descriptor 3.
"""

import base64
import fcntl
import json
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
SECONDS = 60.0
"""Far more than anything here takes, also on a busy machine."""


def find_chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def chromium(program: str, profile: Path) -> Iterator["Browser"]:
    """Starts one with an empty profile in that folder, and ends it with all its processes."""
    ours_in, theirs_out = _pipe()
    theirs_in, ours_out = _pipe()
    arguments = [
        program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
        # It opens nothing but the page under test, and a sandbox is not to be had in every container.
        "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "about:blank",
    ]  # fmt: skip
    with open(profile.with_suffix(".log"), "wb") as log:
        pid = os.posix_spawn(
            program,
            arguments,
            dict(os.environ),
            file_actions=[
                # The log first: its number may be 3 or 4.
                (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            ],
            setpgroup=0,
        )
    os.close(theirs_in)
    os.close(theirs_out)
    browser = Browser(ours_in, ours_out)
    try:
        yield browser
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        browser.close()


def _pipe() -> tuple[int, int]:
    """Its two ends, out of the way of the numbers that the browser's ends are given."""
    ends = os.pipe()
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reading, writing


class Browser:
    """Its one connection; ``open`` gives a page."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")
        self._last = 0
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        """Session, name and contents of each."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._last += 1
        answer = self._answers[self._last] = queue.Queue()
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._outgoing.write(json.dumps(message).encode() + b"\0")
        self._outgoing.flush()
        said = answer.get(timeout=SECONDS)
        assert "error" not in said, f"{method}: {said['error']}"
        result: dict[str, Any] = said["result"]
        return result

    def open(self) -> "Page":
        """An empty page whose events are collected."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable", session)
        self.call("Page.setLifecycleEventsEnabled", session, enabled=True)
        return Page(self, session)

    def close(self) -> None:
        """Ends the connection to a browser that has ended."""
        self._thread.join(SECONDS)
        self._incoming.close()
        self._outgoing.close()

    def _read(self) -> None:
        rest = b""
        while piece := os.read(self._incoming.fileno(), 1 << 16):
            *messages, rest = (rest + piece).split(b"\0")
            for text in messages:
                message = json.loads(text)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                else:
                    self.events.append((message.get("sessionId", ""), message["method"], message["params"]))


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """See ``Browser.call``."""
        return self._browser.call(method, self._session, **params)

    def go(self, url: str) -> None:
        """Loads an address."""
        said = self.call("Page.navigate", url=url)
        assert "errorText" not in said, said["errorText"]
        loader = said["loaderId"]
        self._await(
            lambda: any(
                name == "Page.lifecycleEvent" and params["loaderId"] == loader and params["name"] == "load"
                for name, params in self._events
            ),
            f"{url} to be loaded",
        )

    def evaluate(self, script: str) -> Any:
        """What an expression, or a promise, comes to in the page."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true."""
        self._await(lambda: self.evaluate(f"!!({script})"), script)

    def text(self, selector: str) -> str:
        """What stands in an element."""
        said: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        return said

    def press(self, key: str, *, code: int, modifiers: int = 0) -> None:
        """A key; modifiers: 2 for Control."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                modifiers=modifiers,
            )  # fmt: skip

    def look(self, width: int, *, scheme: str, height: int = 900) -> None:
        """Gives the window a width in CSS pixels, and a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path) -> None:
        """All of the page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings that the page's console shows."""
        found = []
        for method, params in self._events:
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses of everything that was asked for."""
        return [
            params["request"]["url"]
            for method, params in self._events
            if method == "Network.requestWillBeSent"
        ]

    def _await(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.05)

    @property
    def _events(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, params) for session, name, params in self._browser.events if session == self._session]
