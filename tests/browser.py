"""A real browser for tests: Debian's Chromium by its driver, which speaks WebDriver over HTTP at a port of 127.0.0.1.

Source: https://www.w3.org/TR/webdriver2/ and, for `cdp`, https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.tools import require_tool

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the standard gives a reference
ENTER, ESCAPE, SHIFT, TAB = "\ue007", "\ue00c", "\ue008", "\ue004"
SECONDS = 20.0  # for what a page does


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A command of WebDriver.

        Raises:
            AssertionError: the driver refuses it.
        """
        response = httpx.request(method, f"{self._session}{path}", json=body, timeout=60)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body of JavaScript returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, *arguments: Any) -> Any:
        """What an expression of JavaScript gives once it is true."""
        return until(lambda: self.run(f"return {condition}", *arguments), condition)

    def find(self, selector: str) -> str:
        return str(self.ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT])

    def type(self, selector: str, keys: str) -> None:
        self.ask("POST", f"/element/{self.find(selector)}/value", {"text": keys})

    def click(self, selector: str) -> None:
        self.ask("POST", f"/element/{self.find(selector)}/click", {})

    def press(self, *keys: str) -> None:
        """Keys where the focus is, held down together."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def text(self, selector: str) -> list[str]:
        """Of each element that is there, as it is shown."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
        )
        return found

    def size(self, width: int, height: int) -> None:
        """The viewport's, in pixels, also below the narrowest window."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Light or dark, as a user's system has it."""
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def log(self) -> list[str]:
        """What the page's console has had since the last time: errors, refusals of a policy."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]


def until(look: Callable[[], Any], what: str) -> Any:
    """What `look` gives once it is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, f"it didn't happen in {SECONDS:g} s: {what}"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Starts one with a profile of its own; it reaches 127.0.0.1 and nothing else.

    Args:
        profile: a new folder.
    """
    remedy = "apt install chromium chromium-driver"
    chromium = require_tool("chromium", "chromium-browser", remedy=remedy)
    driver = require_tool("chromedriver", remedy=remedy)
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            port = next(
                found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line))
            )
            sessions = f"http://127.0.0.1:{port}/session"
            options = {
                "binary": chromium,
                "args": [
                    "--headless=new",
                    "--no-sandbox",  # which root of a container has no right to
                    "--disable-dev-shm-usage",  # which is small in a container
                    "--disable-gpu",
                    "--disable-background-networking",
                    "--disable-component-update",
                    "--no-first-run",
                    "--no-proxy-server",
                    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                    f"--user-data-dir={profile}",
                ],
            }
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = httpx.post(sessions, json={"capabilities": {"alwaysMatch": wanted}}, timeout=120)
            assert made.status_code == 200, made.text
            window = Browser(f"{sessions}/{made.json()['value']['sessionId']}")
            try:
                yield window
            finally:
                window.ask("DELETE", "")
        finally:
            process.terminate()
