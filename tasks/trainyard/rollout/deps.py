"""What rollouts work with: the parts of the world, behind their protocols."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from trainyard.documents.base import Provenance
from trainyard.documents.evidence import Block, JudgeSpec, Verdict
from trainyard.documents.release import Release
from trainyard.errors import NotFound, TrainyardError
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.looks import LookLog
from trainyard.rollout.metrics import MetricReader
from trainyard.rollout.outbox import Outbox, RolloutEvent
from trainyard.rollout.probes.answers import Prompt, parse_prompts
from trainyard.rollout.probes.prober import NoProber, Prober
from trainyard.rollout.questions import Questions
from trainyard.rollout.release_assets import asset_text
from trainyard.rollout.warm_up import Warmer
from trainyard.serving.guard_events import GuardEvent
from trainyard.serving.protocol import Host, Lease, Router
from trainyard.spec.environments import Environment
from trainyard.spec.model import Target
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class RolloutDeps:
    """The world of a rollout."""

    store: Store
    host: Host
    router: Router
    lease: Lease
    metrics: MetricReader
    warmer: Warmer
    judge: Callable[[Sequence[Block], JudgeSpec], Verdict]
    load_release: Callable[[str, str], Release]
    """By model and release id; checks the signature."""
    guard_events: Callable[[str, str, int], Sequence[GuardEvent]]
    """What the guard did by itself, by model, environment and number of the rollout."""
    environments: Mapping[str, Environment]
    drain_timeout_s: float
    """Seconds that running requests may take before their server is stopped."""
    tell: Callable[[str], None]
    """Takes each event of a rollout, once, as a line for people."""
    notify: Callable[[RolloutEvent], None] = lambda _: None
    """Takes each event of a rollout, once, for whoever wants to be told of it elsewhere."""
    prober: Prober = field(default_factory=NoProber)
    """Sends probes to both releases, where the spec wants them."""
    read_environments: Callable[[], Mapping[str, Environment]] | None = None
    """Reads the rules again, for requests that wait for hours; None: they do not change."""
    proven: Callable[[Target], bool] = lambda _: True
    """Were image, instance and lane of a target proven on a device?"""
    provenance: Provenance = field(default_factory=Provenance)
    """Of attestations."""
    now: Callable[[], datetime] = _utc_now
    sleep: Callable[[float], None] = time.sleep
    looks: LookLog = field(init=False)
    history: HistoryLog = field(init=False)
    outbox: Outbox = field(init=False)
    questions: Questions = field(init=False, default_factory=Questions)
    """To those who only tell something."""
    _releases: dict[str, Release] = field(init=False, default_factory=dict)
    _prompts: dict[str, tuple[Prompt, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Make the caches; all of them are of things that never change."""
        object.__setattr__(self, "looks", LookLog(self.store))
        object.__setattr__(self, "history", HistoryLog(self.store))
        object.__setattr__(self, "outbox", Outbox(self.store, self.tell, self.notify))

    def release(self, model: str, release_id: str) -> Release:
        """Return a release, verified. Raises NotFound, BadInput, CorruptFile."""
        if release_id not in self._releases:
            self._releases[release_id] = self.load_release(model, release_id)
        return self._releases[release_id]

    def with_newest_rules(self) -> RolloutDeps:
        """Return this world with the environments' rules as they are now.

        Rules that cannot be read change nothing: whoever is writing them will be done soon.
        """
        if self.read_environments is None:
            return self
        try:
            return replace(self, environments=self.read_environments())
        except TrainyardError as error:
            log.warning("The rules of before hold until the environments can be read: %s", error)
            return self

    def prompts(self, release: Release) -> tuple[Prompt, ...]:
        """Return what both releases are probed with: the set that went with `release`.

        Raises:
            NotFound, CorruptFile: it is gone or broken.
        """
        if release.release_id not in self._prompts:
            probes = release.spec.rollout.probes
            text = asset_text(self.store, release, probes.prompts) if probes is not None else None
            if text is None:
                raise NotFound(f"No prompts for probes went with {release.release_id}.")
            self._prompts[release.release_id] = parse_prompts(text)
        return self._prompts[release.release_id]

    def environment(self, name: str) -> Environment:
        """Return the rules of an environment. Raises NotFound."""
        try:
            return self.environments[name]
        except KeyError:
            raise NotFound(
                f"There is no environment {name}.",
                hint=f"There are: {', '.join(self.environments) or 'none'}.",
            ) from None
