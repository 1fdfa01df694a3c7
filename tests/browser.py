"""A real browser for the tests: a tab of a headless Chromium (`apt-get install chromium`)."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from websocket import create_connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Tab:
    """A tab of a headless Chromium, driven through its DevTools protocol."""

    def __init__(self, port):
        request = urllib.request.Request(f"http://localhost:{port}/json/new", method="PUT")
        address = json.load(urllib.request.urlopen(request))["webSocketDebuggerUrl"]
        self.socket = create_connection(address, timeout=900, suppress_origin=True)
        self.n, self.events = 0, []
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method, **parameters):
        """The answer. What the browser tells meanwhile is added to `events`."""
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.n:
            self.events.append(answer)
        return answer["result"]

    def evaluate(self, script):
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script, seconds=120):
        for _ in range(4 * seconds):
            if self.evaluate(script):
                return
            time.sleep(0.25)
        raise TimeoutError(script)

    def photograph(self, file):
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def wait_for(ready, seconds=60):
    for _ in range(4 * seconds):
        try:
            return ready()
        except OSError:
            time.sleep(0.25)
    raise TimeoutError


@contextlib.contextmanager
def tab(profile):
    """A tab of a browser that keeps its files in the folder `profile`."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    port = wait_for(lambda: (profile / "DevToolsActivePort").read_text().splitlines()[0])
    yield Tab(port)
    browser.terminate()
    browser.wait(30)
