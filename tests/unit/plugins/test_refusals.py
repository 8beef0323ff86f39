"""What may not be promoted is refused before anything is touched, and the run's result says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.serving_world import NOW, make_release, put_channel
from tests.unit.plugins.conftest import make_context
from tests.unit.yard import Yard

from trainyard.documents.channel import Channel, Rejection
from trainyard.rollout.channel_store import read_channel
from trainyard.settings import get_settings

DAG = "neuron_promote__production"


def refused(release_id: str, **params: Any) -> str:
    """Return the reason in the result of a promotion that is refused."""
    from trainyard_airflow.exceptions import StepRefused
    from trainyard_airflow.rollout_operator import VerifyReleaseOperator

    asked = {"model": "adder", "release": release_id, "force": False, "reason": None, **params}
    context = make_context(asked, dag_id=DAG, run_id="p-1")
    verify = VerifyReleaseOperator(task_id="verify", environment="production")
    with pytest.raises(StepRefused) as raised:
        verify.execute(context)
    result = context["ti"].pushed["return_value"]
    assert (result["outcome"], result["release"]) == ("refused", release_id)
    assert result["reason"] == str(raised.value)
    reason: str = result["reason"]
    return reason


def use_environments(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "environments.yaml"
    path.write_text(f"schema: trainyard/v1\nenvironments:\n  production:\n{text}")
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(path))
    get_settings.cache_clear()


def test_an_unknown_release(yard: Yard) -> None:
    reason = refused("adder-000000000000")
    assert "There is no release adder-000000000000 of model adder." in reason
    assert read_channel(yard.store, "adder", "production").generation == 0


def test_an_unsigned_release(yard: Yard) -> None:
    release = make_release(yard.settings, yard.store, signed=False)
    assert "sign" in refused(release.release_id)


def test_a_rejected_release(yard: Yard) -> None:
    release = make_release(yard.settings, yard.store)
    rejection = Rejection(release_id=release.release_id, at=NOW, rollout=3, reason="Slow answers.")
    put_channel(yard.store, Channel(model="adder", environment="production", rejected=(rejection,)))
    reason = refused(release.release_id)
    assert "was rejected in production by rollout 3: Slow answers." in reason
    assert "needs a reason" in refused(release.release_id, force=True)


def test_a_release_of_another_lane(
    yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release(yard.settings, yard.store)
    use_environments("    target: trn2\n", tmp_path, monkeypatch)
    assert "is for target cpu; production serves trn2" in refused(release.release_id)


def test_a_freeze(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_release(yard.settings, yard.store)
    window = '{start: "2000-01-01T00:00:00Z", end: "2999-01-01T00:00:00Z", reason: a fair}'
    use_environments(f"    target: cpu\n    freeze: [{window}]\n", tmp_path, monkeypatch)
    reason = refused(release.release_id)
    assert "cannot be promoted to production now: it is frozen (a fair)." in reason
    assert "Promote it after 2999-01-01 00:00 UTC" in reason
