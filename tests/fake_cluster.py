"""A fake of a cluster's API server on loopback, for tests: kmock's emulator, made stricter.

What it has of a real server: server-side apply with owners of fields, JSON Patch (422 if a test of
it does not hold), merge patch, resource versions (409 for an old one), generations, label
selectors, pages of lists, `status`, `scale` and `log`, watches that go on from a version and can be
cut, CRDs that may be missing, namespaces, and `Status` objects as errors. It runs no controllers:
tests play them with `put` and `edit`.

::

    with FakeCluster.running() as fake:
        cluster = fake.client()
        fake.faults.append(Fault(plural="httproutes", verb="patch", status=500, times=2))
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import jsonpatch
import jsonpointer
from aiohttp import web
from kmock import KubernetesEmulator
from tests.fake_cluster_fields import Path, as_fields, leaves, merged, without

from trainyard.kubernetes import kinds as known_kinds
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, NAMESPACE, POD, SELF_REVIEW, Kind

NAMESPACE_NAME = "serving"
"""The namespace that there is at the start, beside `default`."""
MORE_KINDS = (
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Secret", "secrets"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
)
NO_STATUS = {"configmaps", "events", "leases", "secrets", "serviceaccounts"}
NO_GENERATION = {*NO_STATUS, "namespaces", "nodes", "services"}
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
NAMESPACES = "namespace-objects"
MICRO_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")

Key = tuple[str, str, str]
"""Plural, namespace and name."""
Manager = tuple[str, str, str]
"""Name, operation (`Apply` or `Update`) and subresource."""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, reason: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": dict(details or {}),
            "code": status,
        }


@dataclass
class Fault:
    """What happens to some requests."""

    verb: str = ""
    """Of the API: get, list, watch, create, update, patch, delete. Empty: every."""
    plural: str = ""
    """Kind of object. Empty: every."""
    status: int = 0
    """Answer with this error. 0: none."""
    reason: str = "InternalError"
    message: str = "asked for"
    details: dict[str, Any] = field(default_factory=dict)
    delay_s: float = 0.0
    """Answer so much later."""
    cut: Literal["", "before", "after"] = ""
    """Break the connection before the request is carried out, or after, instead of an answer."""
    times: int | None = None
    """For so many requests. None: until it is taken out of `FakeCluster.faults`."""

    @classmethod
    def quota(cls, plural: str, **changes: Any) -> Fault:
        """Return the fault of a namespace whose quota is used up."""
        message = (
            f'{plural} "x" is forbidden: exceeded quota: small, requested: {plural}=1, '
            f"used: {plural}=1, limited: {plural}=1"
        )
        return cls("create", plural, 403, "Forbidden", message, **changes)


@dataclass
class Stored:
    """One object with the owners of its fields."""

    body: Object
    owners: dict[Manager, set[Path]] = field(default_factory=dict)
    times: dict[Manager, str] = field(default_factory=dict)

    def shown(self) -> Object:
        """Return the object as the API shows it."""
        body = copy.deepcopy(self.body)
        body["metadata"]["managedFields"] = [
            {
                "manager": name,
                "operation": operation,
                "apiVersion": body["apiVersion"],
                "time": self.times[name, operation, subresource],
                "fieldsType": "FieldsV1",
                "fieldsV1": as_fields(paths),
                **({"subresource": subresource} if subresource else {}),
            }
            for (name, operation, subresource), paths in self.owners.items()
            if paths
        ]
        return body


@dataclass(frozen=True)
class Event:
    """One change, for watches."""

    version: int
    plural: str
    type: str
    body: Object
    before: Object | None


class FakeCluster(KubernetesEmulator):
    """The server. Its own methods are for tests and act as somebody with all rights."""

    def __init__(self) -> None:
        super().__init__()
        found = [kind for kind in vars(known_kinds).values() if isinstance(kind, Kind)]
        self.kinds = {(kind.api_version, kind.plural): kind for kind in (*found, *MORE_KINDS)}
        self.faults: list[Fault] = []
        self.down = False
        """Break every connection."""
        self.token = ""
        """What requests must carry. Empty: nothing."""
        self.denied: set[tuple[str, str]] = set()
        """Verbs and plurals that clients have no right to."""
        self.logs: dict[tuple[str, str, str], str] = {}
        """Of containers, by namespace, pod and container (empty: its only one)."""
        self.log: list[tuple[str, str, str]] = []
        """Verb, plural (with subresource) and name of each request that was carried out."""
        self.address = ""
        self._state: dict[Key, Stored] = {}
        self._events: list[Event] = []
        self._version = 100
        self._oldest = 0
        self._guard = threading.RLock()
        self._watches: list[tuple[asyncio.Event, web.BaseRequest]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        for name in ("default", NAMESPACE_NAME):
            self.put(NAMESPACE, {"metadata": {"name": name}})

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[FakeCluster]:
        """Serve on a free port of loopback, in a thread."""
        fake = cls()
        started = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(fake._serve(started)), daemon=True)
        thread.start()
        assert started.wait(120), "the fake does not start"
        try:
            yield fake
        finally:
            assert fake._loop is not None
            fake._loop.call_soon_threadsafe(fake._ended.set)
            thread.join(120)
        assert not fake.defects, fake.defects

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.defects: list[Exception] = []
        async with self:
            runner = web.ServerRunner(web.Server(self), shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.address = f"http://{host}:{port}"
            started.set()
            await self._ended.wait()
            self.cut_watches()
            await runner.cleanup()
            self.defects = list(self.errors)

    # --- for tests --------------------------------------------------------------------------------

    def client(self, *, token: str = "", timeout_s: float = 120.0) -> Cluster:
        """Return a client of ours."""
        from kubernetes.client import ApiClient, Configuration

        configuration = Configuration(host=self.address)
        configuration.retries = False
        if token:
            configuration.api_key["authorization"] = f"Bearer {token}"
        return Cluster(ApiClient(configuration), timeout_s=timeout_s)

    def kubeconfig(self, token: str = "") -> str:
        """Return a kubeconfig for processes of ours."""
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": self.address}}],
                "users": [{"name": "fake", "user": {"token": token} if token else {}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
            }
        )

    def get(self, kind: Kind, name: str, namespace: str = NAMESPACE_NAME) -> Object | None:
        """Return an object, or None."""
        with self._guard:
            stored = self._state.get((kind.plural, namespace if kind.namespaced else "", name))
            return stored.shown() if stored else None

    def objects(self, kind: Kind) -> list[Object]:
        """Return all objects of a kind."""
        with self._guard:
            return [s.shown() for key, s in self._state.items() if key[0] == kind.plural]

    def put(self, kind: Kind, body: Object, *, manager: str = "somebody") -> Object:
        """Create or replace an object with its status, as a controller or a person would."""
        body = copy.deepcopy(body)
        if kind.namespaced:
            body["metadata"].setdefault("namespace", NAMESPACE_NAME)
        key = (kind.plural, body["metadata"].get("namespace", ""), body["metadata"]["name"])
        with self._guard:
            return self._write(kind, key, body, (manager, "Update", ""), status=True)

    def edit(
        self,
        kind: Kind,
        name: str,
        change: Callable[[Object], None],
        *,
        namespace: str = NAMESPACE_NAME,
        manager: str = "kubectl-edit",
    ) -> Object:
        """Change an object in place, as a controller or a person would."""
        with self._guard:
            key = (kind.plural, namespace if kind.namespaced else "", name)
            body = copy.deepcopy(self._state[key].body)
            change(body)
            return self._write(kind, key, body, (manager, "Update", ""), status=True)

    def remove(self, kind: Kind, name: str, namespace: str = NAMESPACE_NAME) -> None:
        """Delete an object at once."""
        with self._guard:
            self._drop((kind.plural, namespace if kind.namespaced else "", name))

    def uninstall(self, kind: Kind) -> None:
        """Take away a kind, as if its CRD were not installed."""
        del self.kinds[kind.api_version, kind.plural]

    def cut_watches(self) -> None:
        """Break all watches that are open."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._cut_watches)

    def forget_history(self) -> None:
        """Answer watches from any earlier version with 410."""
        with self._guard:
            self._oldest = self._version
            self._events.clear()
        self._wake_watches()

    @property
    def open_watches(self) -> int:
        """How many watches are open now."""
        return len(self._watches)

    # --- requests ---------------------------------------------------------------------------------

    def _get_resources(self) -> list[Any]:
        return [
            self.resource(group=group, version=version, plural=kind.plural)
            for kind in self.kinds.values()
            for group, _, version in [kind.api_version.rpartition("/")]
        ]

    async def _serve_server_version(self, request: Any) -> Any:
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.1"}

    async def __call__(self, raw_request: web.BaseRequest) -> web.StreamResponse:
        # kmock takes every path below `namespaces` for one of something in a namespace.
        found = re.fullmatch(r"/api/v1/namespaces(/[^/]+)?", raw_request.path)
        if found:
            url = raw_request.rel_url.with_path(f"/api/v1/{NAMESPACES}{found[1] or ''}")
            raw_request = raw_request.clone(rel_url=url.with_query(raw_request.rel_url.query))
        return await super().__call__(raw_request)

    async def _handle(self, request: Any) -> web.StreamResponse:
        raw: web.BaseRequest = request._raw_request
        verb = self._verb(request)
        plural = request.resource.plural if request.resource else ""
        plural = "namespaces" if plural == NAMESPACES else plural
        fault = self._fault(verb, plural or "")
        try:
            if self.down:
                return _cut(raw)
            if fault is not None:
                await asyncio.sleep(fault.delay_s)
                if fault.cut == "before":
                    return _cut(raw)
                if fault.status:
                    raise Refusal(fault.status, fault.reason, fault.message, fault.details)
            if self.token and raw.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if not request.resource or not plural:
                return await super()._handle(request)
            answer = await self._answer(request, plural, verb)
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.status)
        if fault is not None and fault.cut == "after":
            return _cut(raw)
        return answer

    @staticmethod
    def _verb(request: Any) -> str:
        if request.method.value != "GET":
            return VERBS.get(request.method.value, "")
        if request.params.get("watch") == "true":
            return "watch"
        return "get" if request.name else "list"

    def _fault(self, verb: str, plural: str) -> Fault | None:
        with self._guard:
            for fault in self.faults:
                if fault.verb in ("", verb) and fault.plural in ("", plural):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            self.faults.remove(fault)
                    return fault
        return None

    async def _answer(self, request: Any, plural: str, verb: str) -> web.StreamResponse:
        at = request.resource
        api_version = f"{at.group}/{at.version}" if at.group else at.version
        kind = self.kinds.get((api_version, plural))
        if kind is None:
            # No Status: nobody is there who would know how to make one.
            return web.Response(status=404, text="404 page not found\n")
        sub = request.subresource or ""
        if (verb, kind.plural) in self.denied:
            raise Refusal(
                403,
                "Forbidden",
                f'{kind.plural}.{at.group} is forbidden: User "fake" cannot {verb} resource '
                f'"{kind.plural}" in API group "{at.group}" in the namespace "{request.namespace}"',
                {"group": at.group, "kind": kind.plural, "name": request.name or ""},
            )
        self.log.append((verb, "/".join(filter(None, (kind.plural, sub))), request.name or ""))
        if verb == "watch":
            return await self._watch(request, kind)
        if sub == "log":
            return self._log_of(request)
        with self._guard:
            body, status = self._carry_out(request, kind, verb, sub)
        return web.json_response(body, status=status)

    def _carry_out(self, request: Any, kind: Kind, verb: str, sub: str) -> tuple[Object, int]:
        key = (kind.plural, request.namespace or "", request.name or "")
        if kind == SELF_REVIEW:
            return self._review(request.data), 201
        if verb == "list":
            return self._list(request, kind), 200
        if verb == "create":
            return self._create(request, kind), 201
        if sub == "scale":
            return self._scale(request, kind, key, verb), 200
        if verb == "get":
            return self._find(kind, key).shown(), 200
        if verb == "delete":
            return self._delete(kind, key), 200
        if verb == "update":
            return self._update(request, kind, key, sub), 200
        return self._patch(request, kind, key, sub)

    def _find(self, kind: Kind, key: Key) -> Stored:
        stored = self._state.get(key)
        if stored is None:
            raise Refusal(
                404, "NotFound", f'{_qualified(kind)} "{key[2]}" not found', _details(kind, key[2])
            )
        return stored

    def _list(self, request: Any, kind: Kind) -> Object:
        labels = request.params.get("labelSelector", "")
        found = [
            stored.shown()
            for key, stored in sorted(self._state.items())
            if key[0] == kind.plural
            and request.namespace in (None, key[1])
            and _selected(stored.body, labels)
        ]
        start = int(request.params.get("continue") or 0)
        size = int(request.params.get("limit") or 0) or len(found) or 1
        metadata: dict[str, Any] = {"resourceVersion": str(self._version)}
        if start + size < len(found):
            metadata["continue"] = str(start + size)
        items = found[start : start + size]
        for item in items:
            del item["kind"], item["apiVersion"]
        return {
            "kind": f"{kind.name}List",
            "apiVersion": kind.api_version,
            "metadata": metadata,
            "items": items,
        }

    def _create(self, request: Any, kind: Kind) -> Object:
        body = request.data
        namespace = request.namespace or body["metadata"].get("namespace", "")
        key = (kind.plural, namespace if kind.namespaced else "", body["metadata"]["name"])
        if key in self._state:
            raise Refusal(
                409,
                "AlreadyExists",
                f'{_qualified(kind)} "{key[2]}" already exists',
                _details(kind, key[2]),
            )
        return self._write(kind, key, body, _manager(request, "Update"))

    def _update(self, request: Any, kind: Kind, key: Key, sub: str) -> Object:
        stored = self._find(kind, key)
        self._demand_current(kind, key, request.data["metadata"].get("resourceVersion"))
        body = _status_only(stored.body, request.data) if sub == "status" else request.data
        return self._write(kind, key, body, _manager(request, "Update", sub), status=bool(sub))

    def _demand_current(self, kind: Kind, key: Key, version: str | None) -> None:
        if version and version != self._state[key].body["metadata"]["resourceVersion"]:
            raise Refusal(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {_qualified(kind)} "{key[2]}": the object has '
                "been modified; please apply your changes to the latest version and try again",
                _details(kind, key[2]),
            )

    def _patch(self, request: Any, kind: Kind, key: Key, sub: str) -> tuple[Object, int]:
        content = request.headers.get("Content-Type", "")
        dry = request.params.get("dryRun") == "All"
        if content == "application/apply-patch+yaml":
            assert request.params.get("fieldManager"), "apply needs a field manager"
            new = key not in self._state
            return self._apply(request, kind, key, dry=dry), 201 if new else 200
        stored = self._find(kind, key)
        if content == "application/json-patch+json":
            body = _json_patched(stored.body, request.data)
        elif content == "application/merge-patch+json" or (
            # They differ in lists with keys only.
            content == "application/strategic-merge-patch+json"
            and set(request.data) == {"metadata"}
        ):
            body = _merge_patched(stored.body, request.data)
        else:
            raise Refusal(
                415, "UnsupportedMediaType", f"the body was in an unknown format: {content}"
            )
        self._demand_current(kind, key, body["metadata"].get("resourceVersion"))
        if sub == "status":
            body = _status_only(stored.body, body)
        manager = _manager(request, "Update", sub)
        return self._write(kind, key, body, manager, status=bool(sub), dry=dry), 200

    def _apply(self, request: Any, kind: Kind, key: Key, *, dry: bool) -> Object:
        manager = _manager(request, "Apply")
        stored = self._state.get(key) or Stored({})
        wanted = _defaulted(kind, copy.deepcopy(request.data))
        wanted.get("metadata", {}).pop("resourceVersion", None)
        own, owned = set(leaves(wanted)), stored.owners.get(manager, set())
        others = set().union(*(p for name, p in stored.owners.items() if name != manager))
        kept = without(stored.body, owned - own - others) if stored.body else {}
        if request.params.get("force") != "true":
            taken = self._conflicts(stored, wanted, manager)
            if taken:
                raise Refusal(409, "Conflict", f"Apply failed with {len(taken)} conflicts: {taken}")
        return self._write(kind, key, merged(kept, wanted), manager, own=own, dry=dry)

    @staticmethod
    def _conflicts(stored: Stored, wanted: Object, manager: Manager) -> list[str]:
        live = leaves(stored.body)
        changed = {path for path, leaf in leaves(wanted).items() if live.get(path, leaf) != leaf}
        return [
            f'conflict with "{name[0]}": {sorted(changed & paths)}'
            for name, paths in stored.owners.items()
            if name != manager and changed & paths
        ]

    def _scale(self, request: Any, kind: Kind, key: Key, verb: str) -> Object:
        stored = self._find(kind, key)
        if verb != "get":
            scale = {"spec": {"replicas": stored.body["spec"].get("replicas", 1)}}
            scale = _merge_patched(scale, request.data) if verb == "patch" else request.data
            body = copy.deepcopy(stored.body)
            body["spec"]["replicas"] = scale["spec"]["replicas"]
            self._write(kind, key, body, _manager(request, "Update", "scale"))
        body = self._state[key].body
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": {
                name: body["metadata"][name]
                for name in ("name", "namespace", "uid", "resourceVersion")
            },
            "spec": {"replicas": body["spec"].get("replicas", 1)},
            "status": {"replicas": body.get("status", {}).get("replicas", 0)},
        }

    def _review(self, body: Object) -> Object:
        asked = body["spec"]["resourceAttributes"]
        allowed = (asked["verb"], asked["resource"]) not in self.denied
        return {**body, "status": {"allowed": allowed}}

    def _log_of(self, request: Any) -> web.Response:
        with self._guard:
            self._find(POD, ("pods", request.namespace, request.name))
            container = request.params.get("container", "")
            text = self.logs.get((request.namespace, request.name, container))
        if text is None:
            raise Refusal(
                400,
                "BadRequest",
                f'container "{container}" in pod "{request.name}" is waiting to start',
            )
        tail = request.params.get("tailLines")
        lines = text.splitlines(keepends=True)
        return web.Response(text="".join(lines[-int(tail) :] if tail else lines))

    # --- state ------------------------------------------------------------------------------------

    def _write(
        self,
        kind: Kind,
        key: Key,
        body: Object,
        manager: Manager,
        *,
        own: set[Path] | None = None,
        status: bool = False,
        dry: bool = False,
    ) -> Object:
        """Store an object. `own`: what `manager` owns from then on; by default what it changed."""
        stored = self._state.get(key)
        before = stored.body if stored else None
        body = _defaulted(kind, copy.deepcopy(body))
        if not status and kind.plural not in NO_STATUS:
            body.pop("status", None)
            if before and "status" in before:
                body["status"] = copy.deepcopy(before["status"])
        self._check(kind, key, body)
        body["metadata"] = self._metadata(kind, key, body, before)
        owners = {name: set(paths) for name, paths in (stored.owners if stored else {}).items()}
        old, new = leaves(before or {}), leaves(body)
        changed = {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}
        for name in owners:
            if name != manager:
                owners[name] = {path for path in owners[name] - changed if path in new}
        mine = owners.get(manager, set()) | changed if own is None else own
        owners[manager] = {path for path in mine if path in new}
        if stored and not changed and owners == stored.owners:
            return stored.shown()
        times = {**(stored.times if stored else {}), manager: _now()}
        result = Stored(body, owners, times)
        if dry:
            return result.shown()
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._state[key] = result
        if body["metadata"].get("deletionTimestamp") and not body["metadata"].get("finalizers"):
            self._drop(key)
        else:
            self._tell("MODIFIED" if stored else "ADDED", key, result.shown(), before)
        return result.shown()

    def _metadata(self, kind: Kind, key: Key, body: Object, before: Object | None) -> Object:
        metadata = {**body["metadata"], "name": key[2]}
        if key[1]:
            metadata["namespace"] = key[1]
        metadata.pop("managedFields", None)
        earlier = (before or {}).get("metadata", {})
        metadata["uid"] = earlier.get("uid") or str(uuid.uuid4())
        metadata["creationTimestamp"] = earlier.get("creationTimestamp") or _now()
        metadata["resourceVersion"] = earlier.get("resourceVersion", "")
        if kind.plural not in NO_GENERATION:
            same = before is not None and before.get("spec") == body.get("spec")
            metadata["generation"] = earlier.get("generation", 0) + (not same)
        return metadata

    def _check(self, kind: Kind, key: Key, body: Object) -> None:
        if key[1] and ("namespaces", "", key[1]) not in self._state:
            raise Refusal(
                404, "NotFound", f'namespaces "{key[1]}" not found', _details(NAMESPACE, key[1])
            )
        body.setdefault("apiVersion", kind.api_version)
        body.setdefault("kind", kind.name)
        wrong = list(_problems(kind, body))
        if wrong:
            raise Refusal(
                422,
                "Invalid",
                f'{kind.name} "{key[2]}" is invalid: {"; ".join(wrong)}',
                {
                    **_details(kind, key[2]),
                    "causes": [{"reason": "FieldValueInvalid", "message": text} for text in wrong],
                },
            )

    def _delete(self, kind: Kind, key: Key) -> Object:
        stored = self._find(kind, key)
        if stored.body["metadata"].get("finalizers"):
            body = copy.deepcopy(stored.body)
            body["metadata"]["deletionTimestamp"] = _now()
            return self._write(kind, key, body, ("apiserver", "Update", ""), status=True)
        self._drop(key)
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": {**_details(kind, key[2]), "uid": stored.body["metadata"]["uid"]},
        }

    def _drop(self, key: Key) -> None:
        stored = self._state.pop(key)
        self._version += 1
        gone = stored.shown()
        gone["metadata"]["resourceVersion"] = str(self._version)
        self._tell("DELETED", key, gone, stored.body)
        uid = stored.body["metadata"]["uid"]
        for other, kept in list(self._state.items()):
            owners = kept.body["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == uid for owner in owners) and other in self._state:
                self._drop(other)

    # --- watches ----------------------------------------------------------------------------------

    def _tell(self, type_: str, key: Key, body: Object, before: Object | None) -> None:
        self._events.append(Event(self._version, key[0], type_, body, before))
        self._wake_watches()

    def _wake_watches(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: [event.set() for event, _ in self._watches])

    def _cut_watches(self) -> None:
        for _, raw in list(self._watches):
            if raw.transport is not None:
                raw.transport.abort()

    async def _watch(self, request: Any, kind: Kind) -> web.StreamResponse:
        raw: web.BaseRequest = request._raw_request
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        changed = asyncio.Event()
        watch = (changed, raw)
        self._watches.append(watch)
        version = int(request.params.get("resourceVersion") or 0)
        deadline = asyncio.get_running_loop().time() + float(
            request.params.get("timeoutSeconds") or 300
        )
        try:
            await response.prepare(raw)
            while True:
                changed.clear()
                with self._guard:
                    lines, version = self._news(request, kind, version)
                for line in lines:
                    await response.write(json.dumps(line).encode() + b"\n")
                if lines and lines[-1]["type"] == "ERROR":
                    break
                # After the news: what was there before the watch is told, however late it is.
                if (left := deadline - asyncio.get_running_loop().time()) <= 0:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), left)
                if raw.transport is None:
                    break
            await response.write_eof()
        except ConnectionError:
            pass
        finally:
            self._watches.remove(watch)
        return response

    def _news(self, request: Any, kind: Kind, version: int) -> tuple[list[Object], int]:
        if version < self._oldest:
            gone = Refusal(410, "Expired", f"too old resource version: {version} ({self._oldest})")
            return [{"type": "ERROR", "object": gone.body}], version
        labels = request.params.get("labelSelector", "")
        lines = []
        for event in self._events:
            if event.version <= version or event.plural != kind.plural:
                continue
            if request.namespace not in (None, event.body["metadata"].get("namespace")):
                continue
            was = event.before is not None and _selected(event.before, labels)
            is_now = event.type != "DELETED" and _selected(event.body, labels)
            if was or is_now:
                kind_of_news = "DELETED" if not is_now else "MODIFIED" if was else "ADDED"
                lines.append({"type": kind_of_news, "object": event.body})
        return lines, self._version


def _cut(raw: web.BaseRequest) -> web.Response:
    if raw.transport is not None:
        raw.transport.abort()
    return web.Response()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _qualified(kind: Kind) -> str:
    group = kind.api_version.rpartition("/")[0]
    return f"{kind.plural}.{group}" if group else kind.plural


def _details(kind: Kind, name: str) -> dict[str, Any]:
    return {"name": name, "group": kind.api_version.rpartition("/")[0], "kind": kind.plural}


def _manager(request: Any, operation: str, sub: str = "") -> Manager:
    agent = request.headers.get("User-Agent", "unknown").partition("/")[0]
    return (request.params.get("fieldManager") or agent, operation, sub)


def _selected(body: Object, selector: str) -> bool:
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, selector.split(",")):
        if term.startswith("!"):
            good = term[1:] not in labels
        elif "=" not in term:
            good = term in labels
        elif "!=" in term:
            name, _, value = term.partition("!=")
            good = labels.get(name) != value
        else:
            name, _, value = term.partition("=")
            good = labels.get(name) == value
        if not good:
            return False
    return True


def _status_only(live: Object, given: Object) -> Object:
    return {**copy.deepcopy(live), "status": given.get("status", {})}


def _json_patched(body: Object, operations: list[Any]) -> Object:
    try:
        patched: Object = jsonpatch.apply_patch(body, operations)
    except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException) as error:
        message = "the server rejected our request due to an error in our request"
        raise Refusal(422, "Invalid", message) from error
    return patched


def _merge_patched(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(value) if isinstance(value, dict) else {}
    for key, item in patch.items():
        if item is None:
            result.pop(key, None)
        else:
            result[key] = _merge_patched(result.get(key), item)
    return result


def _defaulted(kind: Kind, body: Object) -> Object:
    """Fill in what the HTTPRoute's CRD fills in."""
    if kind != HTTP_ROUTE:
        return body
    spec = body.get("spec", {})
    for parent in spec.get("parentRefs", []):
        parent.setdefault("group", "gateway.networking.k8s.io")
        parent.setdefault("kind", "Gateway")
    for rule in spec.get("rules", []):
        rule.setdefault("matches", [{"path": {"type": "PathPrefix", "value": "/"}}])
        for match in rule["matches"]:
            match.setdefault("path", {"type": "PathPrefix", "value": "/"})
            for header in match.get("headers", []):
                header.setdefault("type", "Exact")
        for backend in rule.get("backendRefs", []):
            backend.setdefault("group", "")
            backend.setdefault("kind", "Service")
            backend.setdefault("weight", 1)
    return body


def _problems(kind: Kind, body: Object) -> Iterator[str]:
    spec = body.get("spec") or {}
    if kind == HTTP_ROUTE:
        names = [rule["name"] for rule in spec.get("rules", []) if "name" in rule]
        if len(names) != len(set(names)):
            yield "spec.rules: names must be unique"
        for rule in spec.get("rules", []):
            for backend in rule.get("backendRefs", []):
                if not 0 <= backend["weight"] <= 1_000_000:
                    yield f"backendRefs.weight: {backend['weight']} is out of range"
    if kind.plural == "leases":
        if spec.get("leaseDurationSeconds", 1) <= 0:
            yield "spec.leaseDurationSeconds: must be greater than 0"
        for name in ("acquireTime", "renewTime"):
            if spec.get(name) is not None and not MICRO_TIME.match(spec[name]):
                yield f"spec.{name}: {spec[name]} is no MicroTime"
