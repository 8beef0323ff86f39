"""The thread that sends probes, against real sockets."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
from tests.unit.rollout.probes.completions import completions, events

from trainyard.documents.channel import ProbePlan
from trainyard.documents.look import ProbeCounters, ProbeReading
from trainyard.rollout.probes.answers import Prompt
from trainyard.rollout.probes.prober import HttpProber, NoProber, Wish
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.model import Probes

PROMPTS = tuple(Prompt(f"{number}+0=", str(number)) for number in range(10))


def server(name: str, url: str) -> ServerStatus:
    release_id = "old" if name.startswith("s") else "new"
    return ServerStatus(name, release_id, "ready", url, None, 0, "")


def wish(stable: dict[str, str], candidate: dict[str, str], **changes: Any) -> Wish:
    settings = {"prompts": "p.jsonl", "timeout_s": 20, "max_in_flight": 4, **changes}
    return Wish(
        rollout="m/e/1",
        plan=ProbePlan(settings=Probes.model_validate(settings), comparing="answers"),
        prompts=PROMPTS,
        model="adder",
        stable=[server(*one) for one in stable.items()],
        candidate=[server(*one) for one in candidate.items()],
        cursor=0,
        send_s=60.0,
        rounds_per_s=200.0,
    )


def until(prober: HttpProber, done: Callable[[ProbeReading], bool]) -> ProbeReading:
    """Wait until the counters say so."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        reading = prober.read("m/e/1")
        if reading is not None and done(reading):
            return reading
        time.sleep(0.01)
    raise AssertionError(f"it never came to that: {prober.read('m/e/1')}")


def at_rest(reading: ProbeReading) -> bool:
    return all(one.sent == one.ended for one in reading.pods)


def stop(prober: HttpProber) -> dict[str, ProbeCounters]:
    prober.stop()
    return {one.pod: one for one in until(prober, at_rest).pods}


def right(body: dict[str, Any]) -> list[str]:
    return list(body["prompt"].partition("+")[0])


def test_both_releases_get_the_same_prompts_and_worse_answers_show() -> None:
    seen: dict[str, Counter[str]] = {"s0": Counter(), "c0": Counter()}

    def stable(body: dict[str, Any]) -> list[str]:
        seen["s0"][body["prompt"]] += 1
        return right(body)

    def candidate(body: dict[str, Any]) -> list[str]:
        seen["c0"][body["prompt"]] += 1
        return ["x"] if body["prompt"] in {"3+0=", "7+0="} else right(body)

    prober = HttpProber()
    with completions(stable) as old, completions(candidate) as new:
        asked = wish({"s0": old}, {"c0": new})
        prober.keep(asked)
        until(prober, lambda reading: reading.cursor >= 25)
        found = stop(prober)
    assert seen["s0"] == seen["c0"]
    assert found["s0"].answered == found["c0"].answered == sum(seen["s0"].values()) >= 25
    # Each prompt is scored once, however often it is sent.
    assert [(found[name].pairs, found[name].worse) for name in ("s0", "c0")] == [(10, 0), (10, 2)]
    assert found["c0"].ttft.count == found["c0"].answered


def test_a_release_that_fails_alone_fails_and_an_outage_of_both_is_nothing() -> None:
    prober = HttpProber()
    broken = threading.Event()
    with (
        completions(lambda body: 503 if broken.is_set() else right(body)) as old,
        completions(lambda body: 503) as new,
    ):
        asked = wish({"s0": old}, {"c0": new})
        prober.keep(asked)
        until(prober, lambda reading: sum(one.failed for one in reading.pods) >= 10)
        broken.set()
        until(prober, lambda reading: reading.cursor >= 40)
        found = stop(prober)
    assert found["s0"].failed == 0
    assert found["c0"].failed == found["s0"].answered
    assert found["c0"].ended > found["c0"].failed


def test_it_sends_nothing_after_its_window_and_goes_on_in_the_next() -> None:
    ahead_s = 0.0
    prober = HttpProber(monotonic=lambda: time.monotonic() + ahead_s)
    with completions(right) as url:
        asked = wish({"s0": url}, {"c0": url})
        prober.keep(replace(asked, send_s=0.0))
        first = prober.read("m/e/1")
        assert first is not None
        assert (first.cursor, first.pods) == (0, ())
        prober.keep(asked)
        until(prober, lambda reading: reading.cursor > 0)
        # Nobody closes the window: it is over when its time is, as after the driver's death.
        ahead_s = 100.0
        end = time.monotonic() + 60
        while any(thread.name == "probes" for thread in threading.enumerate()):
            assert time.monotonic() < end
            time.sleep(0.01)
        before = prober.read("m/e/1")
        assert before is not None
        assert at_rest(before)
        prober.keep(asked)
        after = until(prober, lambda reading: reading.cursor > before.cursor)
        assert after.epoch == before.epoch == first.epoch
        stop(prober)


def test_no_probe_is_sent_on_a_connection_that_the_server_may_be_closing() -> None:
    """vLLM closes connections that were idle for 5 s."""
    ports: list[int] = []

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            ports.append(self.client_address[1])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = "".join(f"data: {line}\n\n" for line in events(right(body))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    prober = HttpProber()
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Server) as http,
        completions(right) as new,
    ):
        threading.Thread(target=http.serve_forever, daemon=True).start()
        old = f"http://127.0.0.1:{http.server_address[1]}"
        prober.keep(replace(wish({"s0": old}, {"c0": new}), rounds_per_s=0.4))
        until(prober, lambda reading: reading.cursor >= 3 and at_rest(reading))
        assert stop(prober)["s0"].failed == 0
        http.shutdown()
    assert len(ports) >= 3
    assert all(before != after for before, after in pairwise(ports))


def test_another_process_has_counters_of_its_own_and_goes_on_at_the_cursor() -> None:
    with completions(right) as url:
        asked = wish({"s0": url}, {"c0": url})
        one, other = HttpProber(), HttpProber()
        one.keep(asked)
        until(one, lambda reading: reading.cursor >= 4)
        stop(one)
        seen = one.read("m/e/1")
        assert seen is not None
        other.keep(replace(asked, cursor=seen.cursor))
        until(other, lambda reading: reading.cursor >= 20)
        found = stop(other)
        reading = other.read("m/e/1")
    assert reading is not None
    assert reading.epoch != seen.epoch
    first = max(counters.pairs for counters in seen.pods)
    assert first + found["c0"].pairs == len(PROMPTS)


def test_never_more_than_so_many_are_under_way() -> None:
    lock, release = threading.Lock(), threading.Event()
    now = most = 0

    def slow(body: dict[str, Any]) -> list[str]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        release.wait(0.05)
        with lock:
            now -= 1
        return right(body)

    prober = HttpProber()
    with completions(slow) as url:
        asked = wish({"s0": url}, {"c0": url}, max_in_flight=2)
        prober.keep(asked)
        until(prober, lambda reading: reading.cursor >= 10)
        release.set()
        stop(prober)
    assert most <= 4
    assert prober.slowest_s("m/e/1") > 0


def test_a_prober_whose_thread_broke_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard.rollout.probes import prober as module

    prober = HttpProber()
    with completions(right) as url:
        asked = wish({"s0": url}, {"c0": url})
        with monkeypatch.context() as patch:
            patch.setattr(module.secrets, "token_hex", lambda size: 1 / 0 if size == 16 else "one")
            prober.keep(asked)
            end = time.monotonic() + 60
            while prober.read("m/e/1") is not None:
                assert time.monotonic() < end
                time.sleep(0.01)
        prober.keep(asked)
        assert until(prober, lambda reading: reading.cursor > 0).epoch != "one"
        stop(prober)


def test_one_prober_has_one_rollout() -> None:
    prober = HttpProber()
    with completions(right) as url:
        asked = wish({"s0": url}, {"c0": url})
        prober.keep(asked)
        until(prober, lambda reading: reading.cursor > 0)
        prober.keep(replace(asked, rollout="m/e/2", send_s=0.0))
        assert prober.read("m/e/1") is None
        assert prober.slowest_s("m/e/1") == 0.0
        other = prober.read("m/e/2")
        assert other is not None
        assert other.cursor == 0


def test_without_probes_there_is_nothing_to_read() -> None:
    prober = NoProber()
    prober.keep(wish({}, {}))
    prober.stop()
    assert prober.read("m/e/1") is None
    assert prober.slowest_s("m/e/1") == 0.0
