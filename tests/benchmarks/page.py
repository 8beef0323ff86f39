"""How long the page's overview takes at the server, with 100 models and 2,000 releases.

    python tests/benchmarks/page.py [--models 100] [--releases 2000] [--requests 30]

The store is a folder of this machine. Measured are the first request of a process that nobody
warmed, the warming that follows an API server's start, the first request after it, requests that
read every channel again (nothing is fresh any more), requests while everything is fresh, and, to
compare with, reading and parsing every document of the store once. The aim is 300 ms. On a busy
machine the processor time says more than the time that passed, so both are printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.page_world import FakeAccess
from tests.rollout_world import MODEL, World, make_release

from trainyard.canonical import digest
from trainyard.documents.channel import HISTORY_LIMIT, Channel
from trainyard.documents.statement import payload_of_release
from trainyard.releases import peek_release
from trainyard.settings import Settings
from trainyard.signing.envelope import seal
from trainyard.signing.keys import signing_key
from trainyard.store.documents import parse_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key, release_key
from trainyard_airflow.page import reader
from trainyard_airflow.page.app import create_page

AIM_S = 0.3
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENTS = ("staging", "production")


def example_channel() -> Channel:
    """Return a channel with a rollout under way and a history as long as it may be."""
    world = World()
    first, second = world.publish("first"), world.publish("second")
    world.run(world.promote(first))

    def judged(channel: Channel) -> bool:
        return channel.rollout is not None and channel.rollout.verdict is not None

    world.run(world.promote(second, run_id="second"), until=judged)
    channel = world.channel
    history = (channel.history * HISTORY_LIMIT)[-HISTORY_LIMIT:]
    return channel.model_copy(update={"history": history})


def fill(root: Path, models: int, releases: int) -> None:
    """Write the documents of so many models and releases."""
    channel, release = example_channel(), make_release("any")
    key = signing_key(Settings(home=root.parent))

    def put(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for number in range(models):
        model = f"{MODEL}-{number:03d}"
        for environment in ENVIRONMENTS:
            changes = {"model": model, "environment": environment}
            put(channel_key(model, environment), channel.model_copy(update=changes).to_bytes())
    for number in range(releases):
        model = f"{MODEL}-{number % models:03d}"
        release_id = f"{model}-{digest(number)[:12]}"
        changes = {"model": model, "release_id": release_id}
        put(
            release_key(model, release_id),
            seal(payload_of_release(release.model_copy(update=changes)), key),
        )


def read_everything(root: Path) -> None:
    """Read and parse every document, as a page that lists what it does not need would."""
    store = FolderStore(root)
    for entry in store.list("channels"):
        parse_document(store.read(entry.key).data, entry.key, Channel)
    for entry in store.list("releases"):
        _, model, name = entry.key.split("/")
        peek_release(store, model, name.removesuffix(".json"))


@dataclass(frozen=True)
class Cost:
    """What something took, in seconds."""

    passed: float
    processor: float
    """Of all threads of this process."""

    def __str__(self) -> str:
        return f"{self.passed * 1000:7.0f} ms passed, {self.processor * 1000:7.0f} ms of processor"


def cost(act: Callable[[], object]) -> Cost:
    """Return what `act` takes."""
    passed, processor = time.perf_counter(), time.process_time()
    act()
    return Cost(time.perf_counter() - passed, time.process_time() - processor)


def first_request(home: Path, how: str) -> dict[str, Cost]:
    """Return the costs of a new process that answers one request (see `tests/first_page.py`)."""
    program = REPOSITORY / "tests" / "first_page.py"
    done = subprocess.run(
        [sys.executable, str(program), str(home), how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Cost(*seconds) for name, seconds in found.items()}


def median(costs: list[Cost]) -> Cost:
    """Return the medians of both figures."""
    return Cost(
        statistics.median(each.passed for each in costs),
        statistics.median(each.processor for each in costs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--releases", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=30)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="trainyard-page-") as folder:
        root = Path(folder, "store")
        fill(root, options.models, options.releases)
        settings = Settings(
            home=Path(folder), environments=REPOSITORY / "dags" / "environments.yaml"
        )
        app = create_page(access=FakeAccess(), settings=settings, store=FolderStore(root))
        client = TestClient(app)

        def ask() -> None:
            answer = client.get("/")
            assert answer.status_code == 200
            assert answer.text.count('<tr class="row">') == options.models * len(ENVIRONMENTS)

        cold, warm = (first_request(Path(folder), how) for how in ("cold", "warm"))
        ask()
        fresh = median([cost(ask) for _ in range(options.requests)])
        reader.FRESH_S = 0.0
        again = median([cost(ask) for _ in range(options.requests)])
        everything = cost(lambda: read_everything(root))

    print(
        f"{options.models} models, {options.releases} releases, "
        f"{len(ENVIRONMENTS)} environments, full histories"
    )
    for name, figures in (
        ("first request, not warmed", cold["request"]),
        ("warming after the start", warm["warming"]),
        ("first request, warmed", warm["request"]),
        ("channels read again", again),
        ("everything fresh", fresh),
        ("reading every document", everything),
    ):
        share = figures.processor / everything.processor
        print(
            f"{name:<30}{figures}; {share:.2f} of reading everything, "
            f"{figures.passed / AIM_S:.2f} of the aim"
        )


if __name__ == "__main__":
    main()
