"""`make demo`: four releases of a small model go through everything, with real traffic."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainyard.demo.acts import ACTS, ENVIRONMENT, MODEL, PROMOTE_DAG, RELEASE_DAG, Act
from trainyard.demo.narrator import Narrator, describe_ending
from trainyard.demo.traffic import Statistics, read_statistics
from trainyard.errors import Refused, Transient
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.control import Address, up
from trainyard.platform.environment import base_environment, trainyard_environment
from trainyard.rollout.channel_store import read_channel, reset_channel
from trainyard.serving.agent import remove_servers
from trainyard.settings import Settings
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store
from trainyard.wiring import open_rollout

REQUESTS_PER_S = 5.0
ACT_TIMEOUT_S = 900.0
POLL_S = 1.0


@dataclass(frozen=True)
class Ended:
    """What became of one release."""

    act: Act
    release_id: str
    ending: str
    why: str
    took_s: float


def run_demo(settings: Settings, console: Console) -> int:
    """Run the demonstration; returns 0 if every release ended as it should, else 1.

    Raises:
        TrainyardError: the platform, the training or Airflow failed.
    """
    started = time.monotonic()
    demo = Demo(settings, console)
    console.print(
        "[bold]Trainyard[/]: four releases of a small model, on this machine, with real parts.",
        highlight=False,
    )
    with demo.progress:
        address = demo.prepare()
        ended = demo.play(address)
    demo.print_summary(ended, address, time.monotonic() - started)
    return 0 if all(e.ending == e.act.ending for e in ended) else 1


class Demo:
    """One run of the demonstration."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.store: Store = open_store(settings)
        self.folder = settings.home.resolve() / "demo"
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.started = time.monotonic()
        self.models = self.folder / "models" / MODEL
        self.statistics_file = self.folder / "traffic.json"
        self._training = threading.Thread(target=self._run_training, name="training", daemon=True)
        self._training_failure: BaseException | None = None
        self._traffic: subprocess.Popen[bytes] | None = None

    def say(self, line: str) -> None:
        """Print one line with the time since the start."""
        seconds = int(time.monotonic() - self.started)
        self.console.print(
            f"[dim]{seconds // 60:02d}:{seconds % 60:02d}[/] {line}",
            highlight=False,
            soft_wrap=True,
        )

    def prepare(self) -> Address:
        """Start the platform and the training at once; go on when the first revision is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._training.start()
        address = up(self.settings, self.say)
        login = f"user {address.username}, password {address.password}"
        self.say(f"Airflow: {address.airflow_url}  ({login})")
        revision = ACTS[0].revision
        if not (self.models / revision).exists():
            self.say(f"Waiting for revision {revision} of the model, which is trained meanwhile.")
        self._wait_for(revision)
        self._clear_stage()
        return address

    def _run_training(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self._training_failure = error

    def _wait_for(self, revision: str) -> None:
        """Wait until the training has saved a revision; raise what ended the training if it did."""
        while self._training.is_alive() and not (self.models / revision).exists():
            self._training.join(timeout=0.5)
        if self._training_failure is not None:
            raise self._training_failure

    def _train(self) -> None:
        """Train the revisions of the model, unless they exist."""
        bar = self.progress.add_task("Training the model", total=1.0, note="")
        command = [
            str(self.settings.serving_interpreter),
            "-m",
            "trainyard.demo.training",
            "--out",
            str(self.models),
        ]
        with (self.folder / "training.log").open("w") as errors:
            process = subprocess.Popen(
                command,
                env=base_environment() | trainyard_environment(self.settings),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert process.stdout is not None
        for line in process.stdout:
            self._note_training(bar, json.loads(line))
        if process.wait() != 0:
            raise Transient(
                f"Training the demonstration model failed with exit code {process.returncode}.",
                hint=f"Read {self.folder / 'training.log'}.",
            )
        self.progress.remove_task(bar)

    def _note_training(self, bar: TaskID, event: dict[str, Any]) -> None:
        if "revision" in event:
            how = "exists already" if event["reused"] else "is trained"
            accuracy = event["accuracy"]
            right = f": {accuracy:.0%} of held-out sums are right" if accuracy is not None else ""
            self.say(f"Model {MODEL}, revision {event['revision']} {how}{right}.")
        else:
            self.progress.update(
                bar,
                completed=event["step"] / event["total"],
                note=f"loss {event['loss']:.3f}",
            )

    def _clear_stage(self) -> None:
        """Archive the channel of an earlier run, so that this one starts with a first release."""
        channel = read_channel(self.store, MODEL, ENVIRONMENT)
        if channel.stable is None and channel.rollout is None:
            return
        if channel.in_progress and channel.rollout is not None:
            self.say(f"Ending the rollout of {channel.rollout.release_id} that was cut off.")
            open_rollout(self.settings).settle(
                model=MODEL,
                environment=ENVIRONMENT,
                release_id=None,
                run_id=channel.rollout.driver.run_id,
            )
        self.say("The channel of an earlier run goes to the archive; what was made stays.")
        reset_channel(self.store, MODEL, ENVIRONMENT)
        remove_servers(self.settings, ENVIRONMENT, MODEL)

    def play(self, address: Address) -> list[Ended]:
        """Release one after the other, with traffic from the first stable release on."""
        api = AirflowApi(address.airflow_url, address.username, address.password, embedded=True)
        for dag_id in (RELEASE_DAG, PROMOTE_DAG):
            api.wait_for_dag(dag_id)
        batch = datetime.now().strftime("%Y%m%dT%H%M%S")
        ended = []
        self.statistics_file.unlink(missing_ok=True)
        try:
            for number, act in enumerate(ACTS, start=1):
                self._wait_for(act.revision)
                ended.append(self._play_act(api, act, number, f"demo-{batch}-{number}"))
                if number == 1:
                    if read_channel(self.store, MODEL, ENVIRONMENT).stable is None:
                        raise Refused(
                            f"The first release did not become stable: {ended[0].why}",
                            hint=f"Look at its run in Airflow: {address.airflow_url}",
                        )
                    self.say(f"From now on clients send {REQUESTS_PER_S:.0f} requests a second.")
                    self._traffic = self._start_traffic(address)
        finally:
            if self._traffic is not None:
                self._traffic.send_signal(signal.SIGTERM)
                self._traffic.wait()
        return ended

    def _start_traffic(self, address: Address) -> subprocess.Popen[bytes]:
        with (self.folder / "traffic.log").open("wb") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "trainyard.demo.traffic",
                    f"--url={address.proxy_url}/{ENVIRONMENT}/{MODEL}",
                    f"--model={MODEL}",
                    f"--rate={REQUESTS_PER_S}",
                    f"--stats={self.statistics_file}",
                    "--die-with-parent",
                ],
                env=base_environment(),
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _require_traffic(self) -> None:
        """Fail if the clients are gone: without them the judge would wait in vain."""
        if self._traffic is not None and self._traffic.poll() is not None:
            raise Transient(
                f"The process that sends requests ended with code {self._traffic.returncode}.",
                hint=f"Read {self.folder / 'traffic.log'}.",
            )

    def _play_act(self, api: AirflowApi, act: Act, number: int, run_id: str) -> Ended:
        """Trigger one release over the REST API and tell what happens until its run ends."""
        self.say("")
        self.say(f"[bold]Release {number}: {act.title}[/] ({act.revision}{_changes(act)})")
        started = time.monotonic()
        api.trigger(
            RELEASE_DAG,
            run_id,
            {
                "model": MODEL,
                "revision": act.revision,
                "environments": [ENVIRONMENT],
                "overrides": dict(act.overrides),
            },
            note=act.title,
        )
        narrator = Narrator(self.store, MODEL, ENVIRONMENT, RELEASE_DAG, run_id)
        with self._bar(f"Release {number}") as bar:
            while True:
                self._require_traffic()
                state = api.run_state(RELEASE_DAG, run_id)
                for line in narrator.news():
                    self.say(f"  {line}")
                fraction, note = narrator.progress()
                clients = read_statistics(self.statistics_file)
                self.progress.update(bar, completed=fraction, note=note + _heard(clients))
                if state in {"success", "failed"}:
                    break
                if time.monotonic() - started > ACT_TIMEOUT_S:
                    raise Transient(
                        f"Release {number} did not end within {ACT_TIMEOUT_S:.0f} s.",
                        hint=f"Look at the run {run_id} in Airflow.",
                    )
                time.sleep(POLL_S)
        release_id, ending, why = describe_ending(narrator)
        took_s = time.monotonic() - started
        if (state == "success") != act.succeeds:
            why = f"The run {run_id} of {RELEASE_DAG} is {state}. {why}"
            ending = f"{ending}, but the run is {state}"
        mark = "[green]as expected[/]" if ending == act.ending else "[bold red]not as expected[/]"
        self.say(f"  [bold]{ending}[/] ({mark}) after {took_s:.0f} s")
        return Ended(act, release_id, ending, why, took_s)

    @contextmanager
    def _bar(self, title: str) -> Iterator[TaskID]:
        bar = self.progress.add_task(title, total=1.0, note="")
        try:
            yield bar
        finally:
            self.progress.remove_task(bar)

    def print_summary(self, ended: list[Ended], address: Address, took_s: float) -> None:
        """Print what happened to each release and why, what the clients saw, and where to look."""
        table = Table(title="What happened", title_justify="left", show_lines=True)
        for heading in ("#", "Release", "Outcome", "Why", "Took"):
            table.add_column(heading, overflow="fold")
        for number, end in enumerate(ended, start=1):
            colour = "green" if end.ending == end.act.ending else "red"
            table.add_row(
                str(number),
                f"{end.act.title}\n[dim]{end.release_id or 'not published'}[/]",
                f"[{colour}]{end.ending}[/]",
                end.why,
                f"{end.took_s:.0f} s",
            )
        self.console.print()
        self.console.print(table)
        clients = read_statistics(self.statistics_file)
        if clients is not None:
            self.console.print(_clients_sentence(clients), highlight=False, soft_wrap=True)
            for example in clients.error_examples[:5]:
                self.console.print(f"  {example}", highlight=False, soft_wrap=True)
        self.console.print(
            f"\nAll of it took {took_s / 60:.1f} minutes. Airflow still runs:\n"
            f"  {address.airflow_url}   user [bold]{address.username}[/], "
            f"password [bold]{address.password}[/]\n"
            f"The model still answers:\n"
            f"  {address.proxy_url}/{ENVIRONMENT}/{MODEL}/v1/completions\n"
            f"`make down` stops everything.",
            highlight=False,
            soft_wrap=True,
        )


def _changes(act: Act) -> str:
    return "".join(f", {key}={value}" for key, value in act.overrides.items())


def _heard(clients: Statistics | None) -> str:
    return f"  requests {clients.sent}, errors {clients.errors}" if clients else ""


def _clients_sentence(clients: Statistics) -> str:
    share = clients.right / clients.sums if clients.sums else 0.0
    return (
        f"Clients sent {clients.sent} requests through the proxy: {clients.answered} answered, "
        f"[bold]{clients.errors}[/] failed. {share:.1%} of {clients.sums} sums were right."
    )
