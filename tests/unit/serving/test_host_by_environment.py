"""Each call goes to the host of its environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
from tests.rollout_world import MODEL, make_release

from trainyard.documents.release import Release
from trainyard.errors import NotFound
from trainyard.serving.by_environment import HostByEnvironment
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.environments import Environment
from trainyard.wiring import _host


@dataclass
class NotingHost:
    """A host that notes what it is asked for."""

    calls: list[str] = field(default_factory=list)

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        self.calls.append(f"deploy {environment} {replicas}")

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        self.calls.append(f"scale {environment} {release_id} {replicas}")

    def remove(self, environment: str, release_id: str) -> None:
        self.calls.append(f"remove {environment} {release_id}")

    def hold_autoscaling(self, environment: str, model: str) -> None:
        self.calls.append(f"hold {environment} {model}")

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        self.calls.append(f"resume {environment} {model} {release_id}")

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        self.calls.append(f"servers {environment} {model}")
        return [ServerStatus(environment, model, "ready", "", None, 0, "")]


def test_calls_reach_the_environment_s_own_host() -> None:
    local, cluster = NotingHost(), NotingHost()
    host = HostByEnvironment({"here": local, "there": cluster}.__getitem__)
    host.deploy("there", make_release("a"), 2)
    host.scale("there", "r", 3)
    host.remove("there", "r")
    host.hold_autoscaling("there", MODEL)
    host.resume_autoscaling("there", MODEL, "r")
    assert local.calls == []
    assert cluster.calls == [
        "deploy there 2",
        "scale there r 3",
        "remove there r",
        f"hold there {MODEL}",
        f"resume there {MODEL} r",
    ]
    assert host.servers("here", MODEL)[0].name == "here"
    assert local.calls == [f"servers here {MODEL}"]


def test_an_environment_that_nobody_knows_is_named() -> None:
    environments = {"here": Environment(target="cpu")}
    host = HostByEnvironment(partial(_host, {"local": NotingHost()}, environments))
    with pytest.raises(NotFound, match=r"no environment nowhere\. There are: here"):
        host.servers("nowhere", MODEL)
