"""What a plan says of its rollouts, and when it refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from tests.rollout_world import MODEL, QUICK_ROLLOUT
from tests.unit.rollout.machine import NOW, make_plan, requested, used_channel

from trainyard.documents.channel import Channel, RolloutPlan
from trainyard.documents.forecast import DevicesForecast, RolloutForecast
from trainyard.documents.look import Look, ReleaseCounters, RouteCounters, Snapshot
from trainyard.presets.known import presets
from trainyard.rollout.forecast import Rehearsal
from trainyard.spec.environments import Environment
from trainyard.spec.metrics import DEVICES_UNSEEN, MetricsSource
from trainyard.spec.model import RolloutSpec
from trainyard.steps import forecasting
from trainyard.steps.forecasting import forecast, problems, sentences, warnings
from trainyard.store.documents import create_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key

NAME = "production"
ROOT = Path(__file__).parents[3]
SPEC = RolloutSpec.model_validate(QUICK_ROLLOUT)


def spec_with(**changes: object) -> RolloutSpec:
    return RolloutSpec.model_validate({**QUICK_ROLLOUT, **changes})


def seen(
    store: FolderStore, spec: RolloutSpec = SPEC, *, devices: int = 2
) -> tuple[RolloutForecast, str]:
    environment = Environment(target="cpu", devices=devices)
    found = forecast(store, MODEL, NAME, environment, spec, drain_timeout_s=30.0)
    return found, "\n".join(sentences(found))


def write_channel(store: FolderStore, channel: Channel) -> None:
    create_document(store, channel_key(channel.model, channel.environment), channel)


def write_looks(store: FolderStore, arrivals: Sequence[int]) -> None:
    """Store the looks of rollout 1, half a minute apart."""
    for slot, count in enumerate(arrivals):
        one = ReleaseCounters(arrivals=count, errors=0, in_flight=0)
        snapshot = Snapshot(
            at=NOW + timedelta(seconds=30 * slot),
            phase="holding",
            step_index=0,
            pods=(),
            route=RouteCounters(epoch="one", weights={}, releases={"old": one}),
        )
        look = Look(rollout=1, slot=slot, snapshot=snapshot)
        create_document(store, f"rollouts/{MODEL}/{NAME}/1/looks/{slot:06d}.json", look)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def test_a_first_release_is_compared_with_nothing(store: FolderStore) -> None:
    found, text = seen(store, spec_with(expected_rps=5.0))
    assert (found.kind, found.promoted_share, found.servers_needed) == ("bootstrap", None, 1)
    assert "nothing serves there yet" in text
    assert not [*problems(found, SPEC), *warnings(found, SPEC)]


def test_without_known_traffic_nobody_is_told_more_than_the_steps(store: FolderStore) -> None:
    write_channel(store, used_channel())
    found, text = seen(store)
    assert (found.traffic, found.promoted_share) == (None, None)
    assert "10 % for 30 s, 50 % for 60 s at least" in text
    assert "rollout.expected_rps" in text
    assert "40 s of bake with 10 % held back (latencies are not compared" in text
    _, text = seen(store, spec_with(holdback_weight=50))
    assert "50 % held back (latencies are compared as well)" in text
    assert not [*problems(found, SPEC)]


def test_the_last_rollout_tells_the_traffic(store: FolderStore) -> None:
    write_channel(store, requested(used_channel(), make_plan()))
    write_looks(store, [0, 100, 300, 600])
    found, text = seen(store)
    assert found.traffic is not None
    assert round(found.traffic.requests_per_s, 1) == 6.7
    assert found.promoted_share == 1.0
    assert found.verdict_requests is not None
    assert found.verdict_requests > 0
    assert "as seen until 2026-11-22 12:01 UTC" in text
    assert "100% are in 600 s." in text


def test_what_the_spec_expects_counts_more(store: FolderStore) -> None:
    write_channel(store, requested(used_channel(), make_plan()))
    write_looks(store, [0, 600])
    found, text = seen(store, spec_with(expected_rps=50.0))
    assert found.traffic is not None
    assert found.traffic.requests_per_s == 50.0
    assert "as rollout.expected_rps says" in text


@pytest.mark.parametrize("wanted", ["refuse", "warn"])
def test_a_rollout_that_cannot_be_decided_is_refused_unless_the_spec_says_otherwise(
    store: FolderStore, wanted: str
) -> None:
    write_channel(store, used_channel())
    spec = spec_with(expected_rps=0.05, on_scarce_evidence=wanted)
    found, text = seen(store, spec)
    assert found.promoted_share == 0.0
    assert "fewer than half" in text
    refused, warned = [*problems(found, spec)], [*warnings(found, spec)]
    (told,) = refused if wanted == "refuse" else warned
    assert not (warned if wanted == "refuse" else refused)
    assert "Only 0% of all releases" in told
    assert "rollout.max_duration_s" in told


def test_who_has_too_little_evidence_is_told_which_probes_would_do(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearsed(plan: RolloutPlan, *_: object, **__: object) -> Rehearsal:
        share = 0.05 if plan.probes is None else 0.9
        return Rehearsal(share, None, None, None)

    asked: list[float] = []

    def enough(*_: object, share: float, lag_s: float) -> float:
        asked.append(lag_s)
        return 0.5

    monkeypatch.setattr(forecasting, "rehearse", rehearsed)
    monkeypatch.setattr(forecasting, "enough_probes", enough)
    monkeypatch.setattr(forecasting, "enough_time", lambda *_, **__: 7200.0)
    monkeypatch.setattr(forecasting, "enough_margin", lambda *_, **__: 0.25)
    write_channel(store, used_channel())
    spec = spec_with(expected_rps=1.0)
    found, _ = seen(store, spec)
    assert (found.probes_per_s, found.enough_probes_per_s) == (None, 0.5)
    (told,) = problems(found, spec)
    assert (
        "Any of these would do: rollout.probes: {prompts: FILE, pairs_per_s: 0.5}; "
        "rollout.max_duration_s: 7200; rollout.judge.margins with promote: 0.25 for ttft and tpot. "
    ) in told
    probed = spec_with(expected_rps=1.0, probes={"prompts": "p.jsonl", "pairs_per_s": 0.5})
    found, text = seen(store, probed)
    assert (found.probes_per_s, found.enough_probes_per_s) == (0.5, None)
    assert "and 0.5 pairs of probes a second" in text
    assert not [*problems(found, probed)]
    assert asked == [0.0]


@pytest.mark.parametrize("share", [0.475, 0.5, 0.775, 0.8])
def test_below_a_half_it_refuses_and_below_four_fifths_it_warns(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(
        forecasting, "rehearse", lambda *_, **__: Rehearsal(share, None, None, None)
    )
    for name in ("enough_probes", "enough_time", "enough_margin"):
        monkeypatch.setattr(forecasting, name, lambda *_, **__: None)
    write_channel(store, used_channel())
    spec = spec_with(expected_rps=1.0, probes={"prompts": "p.jsonl", "pairs_per_s": 0.5})
    found, _ = seen(store, spec)
    refused, warned = [*problems(found, spec)], [*warnings(found, spec)]
    assert (len(refused), len(warned)) == (share < 0.5, 0.5 <= share < 0.8)
    for told in (*refused, *warned):
        assert "Begin with larger steps, use more replicas" in told


def test_who_probes_too_seldom_is_told_the_rate(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "rehearse", lambda *_, **__: Rehearsal(0.1, None, None, None))
    monkeypatch.setattr(forecasting, "enough_probes", lambda *_, **__: 2.0)
    for name in ("enough_time", "enough_margin"):
        monkeypatch.setattr(forecasting, name, lambda *_, **__: None)
    write_channel(store, used_channel())
    spec = spec_with(expected_rps=1.0, probes={"prompts": "p.jsonl", "pairs_per_s": 0.5})
    (told,) = problems(seen(store, spec)[0], spec)
    assert "Any of these would do: rollout.probes.pairs_per_s: 2. Else begin" in told


def catalogue() -> list[tuple[RolloutSpec, list[str]]]:
    """Return the different rollouts of the recipes and of the example, with who has them."""
    found: list[tuple[RolloutSpec, list[str]]] = []
    example = yaml.safe_load((ROOT / "dags/models/adder.yaml").read_text(encoding="utf-8"))
    specs = [("adder", RolloutSpec.model_validate(example["rollout"]))]
    for name, spec in [*specs, *((each.name, each.spec.rollout) for each in presets())]:
        known = next((names for one, names in found if one == spec), None)
        if known is None:
            found.append((spec, [name]))
        else:
            known.append(name)
    return found


@pytest.mark.parametrize(("spec", "names"), catalogue(), ids=[names[0] for _, names in catalogue()])
def test_nobody_is_refused_for_having_taken_over_a_recipe_as_it_is(
    store: FolderStore, spec: RolloutSpec, names: list[str]
) -> None:
    write_channel(store, used_channel())
    usual = spec.model_copy(update={"expected_rps": 1.0 if "adder" in names else 8.0})
    assert not [*problems(seen(store, usual)[0], usual)], names


def test_servers_of_other_models_take_their_room(store: FolderStore) -> None:
    write_channel(store, used_channel())
    other = used_channel().model_copy(update={"model": "other"})
    write_channel(store, requested(other, make_plan()))
    elsewhere = used_channel().model_copy(update={"model": "third", "environment": "staging"})
    write_channel(store, elsewhere)
    found, _ = seen(store, devices=3)
    assert (found.servers_needed, found.servers_free) == (2, 1)
    (told,) = warnings(found, SPEC)
    assert "room for 1 servers beside those of other models" in told


@pytest.mark.parametrize("on_neuron", [False, True])
def test_devices_whose_errors_nobody_sees_are_told(store: FolderStore, on_neuron: bool) -> None:
    def told(environment: Environment) -> list[str]:
        found = forecast(
            store, MODEL, NAME, environment, SPEC, drain_timeout_s=30.0, on_neuron=on_neuron
        )
        return [*warnings(found, SPEC)]

    plain = Environment(target="cpu", devices=2)
    seeing = plain.model_copy(
        update={"metrics": MetricsSource(source="prometheus", url="http://127.0.0.1:9090")}
    )
    assert told(plain) == ([DEVICES_UNSEEN] if on_neuron else [])
    assert told(seeing) == []


def with_devices(store: FolderStore, **known: int | str) -> tuple[str, list[str]]:
    """Return what is said, and warned of, with these devices of 16 a server."""
    write_channel(store, used_channel())
    devices = DevicesForecast.model_validate(
        {"instance": "trn2.48xlarge", "per_server": 16, **known}
    )
    found = forecast(
        store, MODEL, NAME, Environment(target="cpu"), SPEC, drain_timeout_s=30.0, devices=devices
    )
    assert not [*problems(found, SPEC)]
    return "\n".join(sentences(found)), [*warnings(found, SPEC)]


def test_free_devices_are_told_beside_those_that_are_needed(store: FolderStore) -> None:
    text, warned = with_devices(store, nodes=3, total=48, free=16, room=1, stable_servers=1)
    assert (
        "it needs 32 devices of trn2.48xlarge at most (16 a server), of which the stable release "
        "has 16 already; 16 of 48 are free on the 3 nodes that are there now, room for 1 servers "
        "more."
    ) in text
    assert not warned


def test_too_few_free_devices_are_a_warning_and_refuse_nothing(store: FolderStore) -> None:
    text, (told,) = with_devices(store, nodes=2, total=32, free=16, room=0, stable_servers=1)
    assert "16 of 32 are free on the 2 nodes" in text
    assert "room for 0 servers more, and the rollout needs 1" in told
    assert "unless an autoscaler adds nodes" in told


def test_devices_that_nobody_could_count_are_not_called_none(store: FolderStore) -> None:
    text, warned = with_devices(store, unknown="Node: the cluster does not answer.")
    assert "how many are free is not known: Node: the cluster does not answer." in text
    assert "0 of 0" not in text
    assert not warned
