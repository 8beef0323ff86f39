"""A real Chromium for tests, spoken to over its DevTools protocol: no driver program is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    "",
)
"""The program; empty if there is none."""

PATIENCE_S = 120.0
EFFECT_S = 10.0
"""Seconds after which a click that shows no effect is made again."""

_PLACE = """(async () => {
  const element = %s;
  if (!element) throw new Error("it is not there");
  element.scrollIntoView({ block: "center", behavior: "instant" });
  const middle = () => {
    const { x, y, width, height } = element.getBoundingClientRect();
    return [x + width / 2, y + height / 2];
  };
  // What is animated moves with the frames, and a busy machine draws few of them.
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await frame();
  const before = middle();
  await new Promise((done) => setTimeout(done, 100));
  await frame();
  const place = middle();
  const hit = element.ownerDocument.elementFromPoint(...place);
  if (String(place) !== String(before)) throw new Error("it moves");
  if (!element.contains(hit)) throw new Error(`it is covered by ${hit?.outerHTML.slice(0, 200)}`);
  for (let view = element.ownerDocument.defaultView; view !== window; view = view.parent) {
    const outer = view.frameElement.getBoundingClientRect();
    place[0] += outer.x;
    place[1] += outer.y;
  }
  return place;
})()"""
"""Where an element is in the window, also one of a frame; an error while a click would miss it."""


class Browser:
    """One tab of a Chromium without a window.

    Errors of the pages' scripts and what their policy refused are in `complaints`.
    """

    def __init__(self, *, width: int = 1280, height: int = 900) -> None:
        self._folder = tempfile.mkdtemp(prefix="trainyard-chromium-")
        self._size = (width, height)
        self._next = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Browser:
        width, height = self._size
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                # Tests may run as root, and pages come from this machine only.
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
                f"--user-data-dir={self._folder}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._attach()
        except BaseException:
            self._process.terminate()
            self._end()
            raise
        self.resize(width, height)
        return self

    def _attach(self) -> None:
        """Open a tab and listen to what it says."""
        self._open = contextlib.ExitStack()
        self._socket: ClientConnection = self._open.enter_context(
            # On a busy machine it may not answer a ping for long, and be well.
            connect(self._address(), max_size=None, ping_interval=None)
        )
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(Exception):
            self._call("Browser.close")
        with contextlib.suppress(Exception):
            self._open.close()
        self._end()

    def _end(self) -> None:
        """Leave neither process nor file behind."""
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _address(self) -> str:
        """Return where the browser listens; it writes that into its folder."""
        file = Path(self._folder, "DevToolsActivePort")
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "Chromium has ended"
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise AssertionError("Chromium did not start")

    # --- the protocol -----------------------------------------------------------------------------

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the tab's protocol and return its result."""
        return self._call(method, session=self._session, **parameters)

    def _call(self, method: str, *, session: str = "", **parameters: Any) -> dict[str, Any]:
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if answer.get("id") == self._next:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: Mapping[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            entry = parameters["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    # --- what a person does -----------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go to a page and wait until it is there."""
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Return what an expression gives in the page; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, json.dumps(answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, script: str, *, timeout_s: float = PATIENCE_S) -> Any:
        """Wait until an expression is true in the page, and return its value."""
        deadline = time.monotonic() + timeout_s
        last: object = None
        while time.monotonic() < deadline:
            try:
                value = self.run(script)
            except AssertionError as error:
                # The page changes while it is asked.
                value, last = None, error
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"waited in vain for {script} in {self.run('location.href')}: {last}")

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as `Tab` (9) or `Enter` (13)."""
        text = {"text": "\r"} if key == "Enter" else {}
        values = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **values, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def click(self, element: str) -> None:
        """Click with the mouse in the middle of the element that an expression gives, as soon as it
        is there and rests."""
        x, y = self.until(_PLACE % element)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click_until(self, element: str, effect: str) -> None:
        """Click, and again until an expression is true: on a busy machine a page may move just as
        the mouse's button goes down, and the click hits something else."""
        deadline = time.monotonic() + PATIENCE_S
        last: object = None
        while time.monotonic() < deadline:
            try:
                if not self.run(effect):
                    self.click(element)
                    self.until(effect, timeout_s=EFFECT_S)
                return
            except AssertionError as error:
                last = error
        raise AssertionError(f"clicked {element} in vain for {effect}: {last}")

    def type(self, text: str) -> None:
        """Type text where the keyboard's focus is."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the window another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def prefer(self, scheme: str) -> None:
        """Prefer `light` or `dark`, as the person's system would."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def set_cookie(self, url: str, name: str, value: str) -> None:
        """Keep a cookie."""
        self.call("Network.setCookie", url=url, name=name, value=value, sameSite="Lax")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Yield a tab that is closed afterwards."""
    with Browser() as tab:
        yield tab
