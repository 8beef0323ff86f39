"""Rollouts of an installation: real store, host, router, lease and guard events, no servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rollout_world import MODEL, make_release

from trainyard.documents.release import Release
from trainyard.errors import BadInput, NotFound
from trainyard.releases import release_id_of, store_release
from trainyard.rollout.channel_store import read_channel
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.store.folder import FolderStore
from trainyard.store.layout import release_key
from trainyard.wiring import Rollouts, open_rollout

pytestmark = pytest.mark.integration

ENVIRONMENTS = """
schema: trainyard/v1
environments:
  production: {target: cpu, devices: 2}
  cluster: {target: cpu, platform: kubernetes, kubernetes: {namespace: serving, image: serve}}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environments = tmp_path / "environments.yaml"
    environments.write_text(ENVIRONMENTS)
    return Settings(home=tmp_path / "home", environments=environments)


@pytest.fixture
def store(settings: Settings) -> FolderStore:
    return FolderStore(settings.store_root)


@pytest.fixture
def release(settings: Settings, store: FolderStore) -> Release:
    """A published release that can be verified."""
    made = make_release("a")
    release_id = release_id_of(
        MODEL,
        checkpoint_digest=made.checkpoint_digest,
        compile_key=made.compile_key,
        serving_digest=made.serving_digest,
    )
    made = made.model_copy(update={"release_id": release_id})
    return store_release(store, made, signing_key(settings))[0]


@pytest.fixture
def rollouts(settings: Settings) -> Rollouts:
    return open_rollout(settings)


def test_a_check_touches_nothing(rollouts: Rollouts, release: Release, store: FolderStore) -> None:
    said = rollouts.check(model=MODEL, environment="production", release_id=release.release_id)
    assert "is the first release" in said
    assert read_channel(store, MODEL, "production").generation == 0


@pytest.mark.parametrize("environment", ["cluster", "nowhere"])
def test_only_environments_of_this_machine_are_known(
    rollouts: Rollouts, release: Release, environment: str
) -> None:
    with pytest.raises(NotFound, match=f"There is no environment {environment}"):
        rollouts.check(model=MODEL, environment=environment, release_id=release.release_id)


def test_without_an_agent_a_rollout_waits_and_is_settled(
    rollouts: Rollouts, release: Release, store: FolderStore
) -> None:
    tick = rollouts.begin(
        kind="promote",
        model=MODEL,
        environment="production",
        release_id=release.release_id,
        run_id="run",
    )
    for _ in range(2):
        result = tick()
    assert not result.done
    assert "The agent does not run" in result.summary
    settled = rollouts.settle(
        model=MODEL, environment="production", release_id=release.release_id, run_id="run"
    )
    assert settled.outcome == "withdrawn"
    assert "Its run ended before the rollout did" in settled.summary
    channel = read_channel(store, MODEL, "production")
    assert (channel.in_progress, channel.candidate) == (False, None)


def test_an_unsigned_release_is_not_rolled_out(
    rollouts: Rollouts, release: Release, store: FolderStore
) -> None:
    key = release_key(MODEL, release.release_id)
    store.put(key, release.model_copy(update={"signature": None}).to_bytes())
    with pytest.raises(BadInput, match="sign"):
        rollouts.check(model=MODEL, environment="production", release_id=release.release_id)
