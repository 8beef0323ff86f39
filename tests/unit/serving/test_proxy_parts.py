"""Parts of the proxy that need no network: paths, the socket's place, engines' figures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from trainyard.serving.keeper import BACKOFF_MOST_S, backoff_s, requests_in
from trainyard.serving.proxy_app import server_target
from trainyard.serving.status_socket import bind, forget_socket, socket_path


def scope(path: str, raw: str | None = None, query: bytes = b"") -> dict[str, object]:
    return {"path": path, "raw_path": (raw or path).encode(), "query_string": query}


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/staging/adder/v1/completions", b"/v1/completions"),
        ("/staging/adder/v1/", b"/v1/"),
        ("/staging/adder/v1", None),
        ("/staging/adder/metrics", None),
        ("/staging/adder", None),
        ("/", None),
        ("/staging/adder/v1/../metrics", None),
        ("/staging/adder/v1/./x", None),
        ("/staging/adder/v1beta/x", None),
    ],
)
def test_only_paths_below_v1_lead_to_a_server(path: str, target: bytes | None) -> None:
    assert server_target(scope(path)) == target


def test_a_path_is_passed_on_as_it_was_written() -> None:
    found = server_target(scope("/s/a/v1/x y", "/s/a/v1/x%20y", b"a=%20&b"))
    assert found == b"/v1/x%20y?a=%20&b"


def test_dots_are_refused_however_they_are_spelt() -> None:
    assert server_target(scope("/s/a/v1/../metrics", "/s/a/v1/%2e%2e/metrics")) is None


def test_a_short_path_is_used_as_it_is(tmp_path: Path) -> None:
    wanted = Path("/tmp/x/proxy.sock")
    assert socket_path(wanted, None) == wanted


def test_a_long_path_is_replaced_by_a_short_private_one_that_is_kept(tmp_path: Path) -> None:
    wanted = tmp_path / ("x" * 100) / "proxy.sock"
    first = socket_path(wanted, None)
    assert len(str(first)) < 100
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert socket_path(wanted, str(first)) == first
    first.parent.chmod(0o755)
    other = socket_path(wanted, str(first))
    assert other != first
    for path in (first, other):
        forget_socket(path, wanted)
        assert not path.parent.exists()


def test_only_the_user_can_reach_the_socket(tmp_path: Path) -> None:
    path = Path(socket_path(tmp_path / "s", None))
    for _ in range(2):
        with bind(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    forget_socket(path, path)
    assert not path.exists()


def test_requests_of_an_engine_are_those_that_run_and_wait() -> None:
    text = (
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 1.0\n'
        'vllm:num_requests_waiting{engine="0"} 4.0\n'
    )
    assert requests_in(text) == 7
    assert requests_in("vllm:num_requests_running 0.0\n") is None
    assert requests_in("") is None


def test_the_pause_between_starts_doubles_up_to_a_limit() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, 4.0]
    assert backoff_s(100_000) == BACKOFF_MOST_S
