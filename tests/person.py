"""A person with a browser: what they do with mouse and keyboard to have a release made, to approve
and to roll back, and what they see meanwhile.

Where a test names a folder, each step leaves a picture there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.browser import Browser

from trainyard.platform.control import Address

FRAME = "document.querySelector('iframe').contentDocument"
TEXT = "(document.querySelector('iframe')?.contentDocument?.body?.innerText ?? '')"
RELEASE_DAG = "neuron_release"
START_S = 240.0
"""Seconds that Airflow's interface may take to show on a machine that is busy."""
CANARY_S = 900.0
"""Seconds that a canary may take, from its approval to its end."""

_LOOK = f"""(() => {{
  const page = {FRAME}, live = page.getElementById('live'), text = page.body.innerText;
  const figure = (words) => Number(words.exec(text)?.[1] ?? 0);
  return {{
    state: live.dataset.state,
    weight: figure(/Candidate, (\\d+) %/),
    exposed: figure(/Answered by the candidate\\s+(\\d+)/),
    points: page.querySelectorAll('.plot circle').length,
    ended: [...page.querySelectorAll('h2 .badge')].map(each => each.innerText).join(),
  }};
}})()"""


def button(words: str, *, inside: str = "") -> str:
    """Return the expression for the last button that says exactly this."""
    places = f"[...document.querySelectorAll('{inside} button')]"
    return f"{places}.findLast(each => each.innerText.trim() === '{words}')"


def _opens(dialog: str) -> str:
    """Return the expression for what opens a dialog of the page, while it can be opened."""
    return f"{FRAME}.querySelector('[data-opens={dialog}]')"


@dataclass
class CanarySeen:
    """What somebody saw on the page of a canary, without ever loading it again."""

    weights: list[int] = field(default_factory=list)
    """The candidate's share of the traffic, each change of it."""
    exposed: list[int] = field(default_factory=list)
    """Requests that the candidate had answered, each change of it."""
    points: list[int] = field(default_factory=list)
    """Points of the judge's curves, each change of it."""
    points_while_paused: list[int] = field(default_factory=list)
    ended: str = ""
    """What the page said in the end."""

    def note(self, look: dict[str, Any]) -> None:
        """Keep what is new."""
        kept = [("weight", self.weights), ("exposed", self.exposed), ("points", self.points)]
        if look["state"] == "paused":
            kept.append(("points", self.points_while_paused))
        for name, values in kept:
            if not values or values[-1] != look[name]:
                values.append(look[name])


class Person:
    """Somebody who has a browser, an address, a name and a password.

    Args:
        tab: of the browser, empty.
        address: of the platform.
        pictures: folder for pictures; None: none are made.
    """

    def __init__(self, tab: Browser, address: Address, pictures: Path | None = None) -> None:
        self.tab = tab
        self.address = address
        self.pictures = pictures

    def picture(self, name: str) -> None:
        """Leave a picture of what is seen."""
        if self.pictures is not None:
            self.pictures.mkdir(parents=True, exist_ok=True)
            # What moves (dialogs that open, for example) comes to rest.
            time.sleep(1)
            self.tab.screenshot(self.pictures / f"{name}.png")

    # --- Airflow's own interface ------------------------------------------------------------------

    def log_in(self) -> None:
        """Open Airflow, and say who they are."""
        self.tab.open(self.address.airflow_url)
        self.tab.until("!!document.querySelector('input[name=username]')", timeout_s=START_S)
        self._write("document.querySelector('input[name=username]')", self.address.username)
        self._write("document.querySelector('input[name=password]')", self.address.password)
        self.tab.click("document.querySelector('button[type=submit]')")
        self.tab.until("!location.pathname.startsWith('/auth')", timeout_s=START_S)

    def ask_for_release(self, model: str, revision: str, environment: str) -> str:
        """Fill in the form of `neuron_release`, send it, and return the run that it started."""
        for patience in (2, 1, 0):
            try:
                self._fill_in(model, revision, environment)
                break
            except AssertionError:
                # A click beside the form closes it.
                if not patience or self.tab.run("!!document.querySelector('[role=dialog]')"):
                    raise
        self.tab.click(button("Trigger", inside="[role=dialog]"))
        self.tab.until(f"location.pathname.startsWith('/dags/{RELEASE_DAG}/runs/')")
        run_id: str = self.tab.run("location.pathname.split('/')[4]")
        return unquote(run_id)

    def _fill_in(self, model: str, revision: str, environment: str) -> None:
        self.tab.open(f"{self.address.airflow_url}/dags/{RELEASE_DAG}")
        self.tab.until(f"!!{button('Trigger')}", timeout_s=START_S)
        self.tab.click_until(button("Trigger"), f"!!{button('What', inside='[role=dialog]')}")
        # Opening a section of the form closes the one before.
        self._open_section("What")
        shown = "document.querySelector('#element_model').innerText.trim()"
        if self.tab.run(shown) != model:
            self._choose("model", model)
        self._write("document.querySelector('#element_revision')", revision)
        self.picture("1-what")
        self._open_section("Where")
        self._choose("environments", environment)
        self.picture("2-where")

    def _open_section(self, name: str) -> None:
        """Open a section of Airflow's form."""
        section = button(name, inside="[role=dialog]")
        self.tab.click_until(section, f"{section}?.getAttribute('aria-expanded') === 'true'")

    def _choose(self, field_name: str, value: str) -> None:
        """Choose in a list of Airflow's form."""
        self.tab.click(f"document.querySelector('#element_{field_name}')")
        self.tab.type(value)
        self.tab.press("Enter", 13)
        self.tab.until(
            f"document.querySelector('#element_{field_name}').innerText.includes('{value}')"
        )

    def _write(self, element: str, text: str) -> None:
        self.tab.click(element)
        self.tab.type(text)
        self.tab.until(f"{element}.value === {text!r}")

    # --- the Trainyard page -----------------------------------------------------------------------

    def look_at_release(self, run_id: str) -> None:
        """Open the tab of the run that shows its steps, and wait until it says `published`."""
        self.tab.open(
            f"{self.address.airflow_url}/dags/{RELEASE_DAG}/runs/{run_id}/plugin/trainyard-run"
        )
        self.tab.until(f"{TEXT}.includes('✓ published')", timeout_s=START_S)
        self.picture("3-release")

    def open_channel(self, environment: str, model: str) -> None:
        """Open the page of a channel."""
        path = f"/plugin/trainyard/trainyard/channels/{environment}/{model}"
        self.tab.open(self.address.airflow_url + path)
        self.tab.until(f"{TEXT}.includes('{model} in {environment}')", timeout_s=START_S)

    def approve(self) -> None:
        """Wait for the question, say yes, and see that the canary begins.

        They say it again if they are asked again: docs/approvals.md says when Airflow does that.
        """
        asking = f"!!{_opens('answer')}"
        state = f"{FRAME}.getElementById('live').dataset.state"
        self.tab.until(asking, timeout_s=START_S)
        self._say_yes()
        deadline, since = time.monotonic() + CANARY_S, time.monotonic()
        while self.tab.run(state) == "idle":
            assert time.monotonic() < deadline, "approved, and no canary began"
            if not self.tab.run(asking):
                since = time.monotonic()
            elif time.monotonic() - since > 15:
                # The page shows what it knew for some seconds; this is another question.
                self._say_yes()
                since = time.monotonic()
            time.sleep(0.3)

    def _say_yes(self) -> None:
        self._open("answer")
        self._write(f"{FRAME}.getElementById('answer-note')", "Its gates look good.")
        # They read what is asked first.
        time.sleep(5)
        self.picture("4-approval")
        self._send("answer", "[value=Approve]")
        self._close("answer")

    def watch_canary(self) -> CanarySeen:
        """Look at the page until the canary is over; pause it on the way, and let it go on."""
        seen, deadline = CanarySeen(), time.monotonic() + CANARY_S
        paused, resumed = False, False
        while time.monotonic() < deadline:
            look: dict[str, Any] = self.tab.run(_LOOK)
            seen.note(look)
            if not paused and look["state"] == "moving" and look["points"]:
                self._control("pause", "Let me look at it first.")
                paused = True
            if not resumed and len(seen.points_while_paused) > 1:
                self.picture("5-canary")
                self._control("resume", "")
                resumed = True
            if look["state"] == "idle" and resumed:
                seen.ended = look["ended"]
                self.picture("6-promoted")
                return seen
            time.sleep(0.3)
        raise AssertionError(f"the canary did not end; seen so far: {seen}")

    def roll_back(self, reason: str) -> str:
        """Send everything back to the release before, and return the run that does it."""
        self._open("rollback")
        self._write(f"{FRAME}.getElementById('rollback-reason')", reason)
        self.picture("7-rollback")
        self._send("rollback", "")
        run_id: str = self.tab.run(
            f"{FRAME}.querySelector('#rollback .answer a').getAttribute('href').split('/').at(-1)"
        )
        self._close("rollback")
        return unquote(run_id)

    def see_rolled_back(self) -> None:
        """Wait until the page says that it is done."""
        self.tab.until(f"{FRAME}.getElementById('live').dataset.state === 'idle'")
        self.picture("8-rolled-back")

    def _control(self, action: str, reason: str) -> None:
        self._open(action)
        if reason:
            self._write(f"{FRAME}.querySelector('#{action} input[name=reason]')", reason)
        self._send(action, "")
        self._close(action)

    def _open(self, dialog: str) -> None:
        """Open a dialog of the page."""
        self.tab.click_until(_opens(dialog), f"{FRAME}.getElementById('{dialog}').open")

    def _send(self, dialog: str, which: str) -> None:
        """Press the button of a dialog, and see that Airflow took it."""
        answer = f"{FRAME}.querySelector('#{dialog} .answer')"
        self.tab.click_until(
            f"{FRAME}.querySelector('#{dialog} button[type=submit]{which}')",
            f"{answer}.innerText !== ''",
        )
        self.tab.until(f"/pass|fail/.test({answer}.className)", timeout_s=START_S)
        assert self.tab.run(f"{answer}.className") == "answer pass", self.tab.run(
            f"{answer}.innerText"
        )

    def _close(self, dialog: str) -> None:
        closes = f"{FRAME}.querySelector('#{dialog} [data-closes]')"
        self.tab.click_until(closes, f"!{FRAME}.getElementById('{dialog}').open")
