"""Looks at what decides about a refresh: one call of the source, the toolchain, the store."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainyard.canonical import digest, short
from trainyard.documents.plan import plan_id_of_run
from trainyard.documents.refresh import RefreshRecord
from trainyard.errors import BadInput, NotFound, TrainyardError
from trainyard.lanes.registry import get_lane
from trainyard.refresh.decide import UNKNOWN, Subject
from trainyard.releases import list_releases
from trainyard.settings import Settings
from trainyard.sources.factory import open_source
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.loader import Catalogue, load_spec
from trainyard.spec.model import ModelSpec, Refresh, Target
from trainyard.steps.status import list_statuses
from trainyard.steps.toolchains import toolchain_for
from trainyard.store.documents import read_document
from trainyard.store.layout import refresh_key
from trainyard.store.protocol import Store

RELEASE_DAG = "neuron_release"


@dataclass
class Toolchains:
    """The toolchains of targets; each lane (or image) is asked once, however many threads ask."""

    settings: Settings
    store: Store
    place: KubernetesSteps | None
    """Where steps run as pods; None: on this machine."""
    _known: dict[str, Mapping[str, str] | TrainyardError] = field(default_factory=dict)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def of(self, target: Target, model: str) -> Mapping[str, str]:
        """Return the toolchain that would compile a target. Raises BadInput, Transient."""
        neuron = target.neuron.model_dump(mode="json") if target.neuron else None
        key = digest([target.lane, None if self.place is None else [target.instance, neuron]])
        with self._mutex:
            if key not in self._known:
                self._known[key] = self._ask(target, model)
            found = self._known[key]
        if isinstance(found, TrainyardError):
            raise found
        return found

    def _ask(self, target: Target, model: str) -> Mapping[str, str] | TrainyardError:
        try:
            return toolchain_for(
                target,
                get_lane(target.lane),
                model=model,
                place=self.place,
                settings=self.settings,
                store=self.store,
            ).versions
        except TrainyardError as error:
            return error


@dataclass(frozen=True)
class Seen:
    """What the source and the toolchain say of a model now."""

    spec: ModelSpec
    refresh: Refresh
    subject: Subject
    toolchains: Mapping[str, Mapping[str, str]]
    """By target; empty if toolchains are not followed."""


def look(model: str, settings: Settings, toolchains: Toolchains) -> Seen:
    """Ask a model's source and toolchain, once each.

    Raises:
        NotFound: there is no such model, or its source has no such revision.
        BadInput: its spec is wrong or has no `refresh`, or the source or toolchain is refused.
        Transient: the source cannot be reached now.
    """
    path = Catalogue(settings.catalogue).path(model)
    spec = load_spec(path)
    if spec.refresh is None:
        raise BadInput(
            f"Model {model} is never refreshed: its spec has no `refresh`.",
            hint=f"Add it to {path}, with a `cron`.",
        )
    revision = _newest(spec, path, settings)
    versions: dict[str, Mapping[str, str]] = {}
    if spec.refresh.follow_toolchain:
        versions = {target.name: toolchains.of(target, model) for target in spec.targets}
    toolchain_id = short(digest({name: dict(each) for name, each in versions.items()}))
    subject = Subject(model, revision, toolchain_id if versions else "")
    return Seen(spec, spec.refresh, subject, versions)


def _newest(spec: ModelSpec, path: Path, settings: Settings) -> str:
    source = open_source(spec.source, base=path.parent, settings=settings)
    return source.peek(spec.source.revision)[0]


def read_record(store: Store, model: str) -> RefreshRecord:
    """Return what refreshes of a model have asked for; an empty record if that is nothing."""
    try:
        return read_document(store, refresh_key(model), RefreshRecord)
    except NotFound:
        return RefreshRecord(model=model)


def releases_of(seen: Seen, store: Store) -> tuple[str, ...]:
    """Return the releases of what was seen, one for each target that must have one.

    Whoever asked for them, and whatever became of them: a release that was rejected was made, too.
    Nothing if a target lacks its own.
    """
    targets = [target for target in seen.spec.targets if target.required] or seen.spec.targets
    found: dict[str, str] = {}
    for release in list_releases(store, seen.subject.model):
        if release.request is not None and release.request.overrides:
            continue  # somebody's experiment
        name = release.target.name
        toolchain = seen.toolchains.get(name)
        same = toolchain is None or release.toolchain == dict(toolchain)
        if release.revision == seen.subject.revision and same:
            found.setdefault(name, release.release_id)
    if any(target.name not in found for target in targets):
        return ()
    return tuple(found[target.name] for target in targets)


def state_in_store(store: Store, model: str, run_id: str) -> str:
    """Return a run's state as far as its steps tell it, for those who cannot ask Airflow."""
    statuses = list_statuses(store, plan_id_of_run(model, RELEASE_DAG, run_id))
    if any(each.state == "running" for each in statuses):
        return "running"
    if any(each.state == "failed" for each in statuses):
        return "failed"
    return UNKNOWN
