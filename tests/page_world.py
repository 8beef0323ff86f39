"""A store with all that the page shows: releases with verdicts, a rollout that was promoted, one
that was rolled back, one under way; and a login that is told who asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from fastapi import FastAPI, HTTPException, Request
from tests.rollout_world import ENVIRONMENT, MODEL, Behaviour, MemoryStore, World
from tests.unit.yard import FIGURES, measurement, plan

from trainyard.approvals import Answer, record_answer
from trainyard.canonical import digest
from trainyard.documents.base import Provenance
from trainyard.documents.channel import Channel
from trainyard.documents.measurement import Check, GateVerdict
from trainyard.documents.plan import GateName
from trainyard.documents.release import Release
from trainyard.releases import record_verdict, release_id_of, store_release
from trainyard.reports.gate import gate_report_html
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key, trusted_keys
from trainyard.store.documents import create_document
from trainyard.store.layout import (
    gate_report_key,
    measurement_key,
    plan_key,
    verdict_key,
)
from trainyard.store.protocol import Store
from trainyard_airflow.page.access import Act
from trainyard_airflow.page.app import create_page

PROMOTE = f"neuron_promote__{ENVIRONMENT}"
REPOSITORY = Path(__file__).parents[1]
CHECKS: dict[GateName, tuple[Check, ...]] = {
    "accuracy": (
        Check(what="sums exact_match", observed=0.97, bound=">= 0.9", minimum=0.9, outcome="pass"),
    ),
    "latency": (
        Check(
            what="level busy: ttft_p99_ms",
            observed=210,
            bound="<= 400",
            maximum=400,
            outcome="pass",
        ),
        Check(
            what="level busy: output_tokens_per_s",
            observed=80,
            bound=">= 50",
            minimum=50,
            outcome="pass",
        ),
    ),
}


@dataclass
class FakeAccess:
    """A login that is told who asks and what they may do."""

    name: str = "ada"
    """Empty: nobody has logged in."""
    allowed: set[tuple[Act, str]] | None = None
    """None: everything."""

    @property
    def user(self) -> Callable[..., Awaitable[Any]]:
        async def who(request: Request) -> Any:
            if not self.name:
                raise HTTPException(401, "Not authenticated")
            return SimpleNamespace(get_name=lambda: self.name)

        return who

    def may(self, user: Any, act: Act, dag_id: str) -> bool:
        return self.allowed is None or (act, dag_id) in self.allowed


@dataclass
class PageWorld:
    """A home with a filled store, and the page over it."""

    home: Path
    access: FakeAccess = field(default_factory=FakeAccess)
    store: Store = field(default_factory=MemoryStore)
    summary: str = ""
    """What the gates say; empty: that they passed."""
    warnings: tuple[str, ...] = ()
    """What the verdicts warn of."""
    policy: Mapping[str, Any] | None = None
    """Changes to `production` in the environments file."""

    def __post_init__(self) -> None:
        environments = REPOSITORY / "dags" / "environments.yaml"
        if self.policy is not None:
            file = yaml.safe_load(environments.read_text())
            file["environments"][ENVIRONMENT] |= self.policy
            self.home.mkdir(parents=True, exist_ok=True)
            environments = self.home / "environments.yaml"
            environments.write_text(yaml.safe_dump(file, sort_keys=False))
        self.settings = Settings(
            home=self.home,
            catalogue=REPOSITORY / "dags" / "models",
            environments=environments,
        )
        self.world = World(store=self.store, rate=60.0)
        self.ids: dict[str, str] = {}

    def app(self) -> FastAPI:
        """The page."""
        return create_page(access=self.access, settings=self.settings, store=self.store)

    @property
    def channel(self) -> Channel:
        return self.world.channel

    # --- filling the store ------------------------------------------------------------------------

    def publish(self, name: str, *, behaviour: Behaviour | None = None, **changes: Any) -> str:
        """Store a signed release with its verdicts and reports; return its id."""
        world_id = self.world.publish(name, behaviour=behaviour)
        made = self.world.releases.pop(world_id)
        release_id = release_id_of(
            MODEL,
            checkpoint_digest=digest(name),
            compile_key=made.compile_key,
            serving_digest=made.serving_digest,
        )
        values = {
            "release_id": release_id,
            "measurement_id": f"measured-{name}",
            "bundle_digest": digest("bundle"),
            "serving": {"max_num_seqs": 16, "dtype": "float32"},
            "toolchain": {"vllm": "0.32.0", "torch": "2.11.0"},
            "provenance": Provenance(requested_by="ada", dag_run="neuron_release/manual-1"),
            **changes,
        }
        unsigned = made.model_copy(update=values)
        key = signing_key(self.settings)
        release, _ = store_release(self.store, unsigned, key)
        self.world.releases[release_id] = release
        self.world.behaviour[release_id] = self.world.behaviour.pop(world_id)
        self.ids[name] = release_id
        self._judge(name, release)
        return release_id

    def _judge(self, name: str, release: Release) -> None:
        wanted = plan(f"{MODEL}-{digest(name)[:12]}", measurement_id=f"measured-{name}")
        measured = measurement(f"measured-{name}", figures=FIGURES)
        create_document(self.store, plan_key(wanted.plan_id), wanted)
        create_document(self.store, measurement_key(measured.measurement_id), measured)
        gates: tuple[GateName, ...] = ("accuracy", "latency")
        for gate in gates:
            verdict = GateVerdict(
                gate=gate,
                plan_id=wanted.plan_id,
                target="cpu",
                measurement_id=measured.measurement_id,
                outcome="pass",
                checks=CHECKS[gate],
                summary=self.summary or f"The {gate} gate passed.",
            )
            key = verdict_key(wanted.plan_id, "cpu", gate)
            create_document(self.store, key, verdict)
            report = gate_report_html(wanted, measured, verdict)
            self.store.put(gate_report_key(wanted.plan_id, "cpu", gate), report.encode())
            subject = {
                "gate": gate,
                "outcome": verdict.outcome,
                "plan_id": wanted.plan_id,
                "target": "cpu",
                "summary": verdict.summary,
                "key": key,
                "warnings": list(self.warnings),
            }
            record_verdict(
                self.store,
                release,
                subject,
                key=signing_key(self.settings),
                trusted=trusted_keys(self.settings),
            )

    def promote(
        self, name: str, *, until: Callable[[Channel], bool] | None = None, **request: Any
    ) -> None:
        """Promote a release to its end, or until something is true of the channel."""
        run_id = f"{PROMOTE}/promote__{self.ids[name]}__g{self.channel.generation}"
        tick = self.world.promote(self.ids[name], run_id=run_id, requested_by="ada", **request)
        self.world.run(tick, until=until)

    def ask_for_approval(self, name: str, *, needs: int = 1, requester: str = "ada") -> str:
        """Have a promotion wait for people; return its run."""
        run_id = f"{PROMOTE}/promote__{self.ids[name]}__g{self.channel.generation}"
        now = datetime.now(UTC)
        self.say(
            name, "asked", at=now, run_id=run_id, needs=needs, requested_by=requester,
            expires_at=(now + timedelta(hours=1)).isoformat(),
        )  # fmt: skip
        return run_id

    def later(self, seconds: float) -> datetime:
        """Return a moment after now, for an answer."""
        return datetime.now(UTC) + timedelta(seconds=seconds)

    def promote_on(self, name: str) -> None:
        """Begin to promote a release that is approved, and leave it on its way."""
        run_id = self.ask_for_approval(name)
        self.say(name, "approved", at=self.later(1), run_id=run_id, who="bob")
        self.promote(name, until=lambda channel: channel.weights.candidate > 0)

    def say(self, name: str, answer: Answer, *, at: datetime, run_id: str, **said: Any) -> None:
        """Have somebody ask or answer."""
        record_answer(
            self.store, MODEL, self.ids[name], answer,
            environment=ENVIRONMENT, run_id=run_id, at=at, **said,
        )  # fmt: skip

    def fill(self) -> None:
        """One release is stable, one was rolled back, and one is on its way."""
        self.publish("first")
        self.publish("second")
        self.publish("slow", behaviour=Behaviour(ttft_s=0.09), serving={"max_num_seqs": 1})
        self.publish("third", behaviour=Behaviour(ttft_s=0.029))
        self.promote("first")
        self.promote("second")
        self.promote("slow")
        self.promote("third", until=looked_several_times)


def looked_several_times(channel: Channel) -> bool:
    """Tell whether the rollout is at its second step and the judge has seen something of it."""
    rollout = channel.rollout
    return (
        rollout is not None
        and rollout.phase == "holding"
        and rollout.step_index == 1
        and rollout.verdict is not None
        and rollout.verdict.looks > 6
    )
