"""What a pod's status says about its server, in one sentence: pure.

::

    pod                                                            state
    it is being deleted                                            stopping
    it passes its readiness probe                                  ready
    it passed its startup probe, but not its readiness probe       unhealthy
    its restore failed in a way that a retry cannot mend           failed
    it was started again and again, and waits for the next time    failed
    its image's name is wrong, or is not on the node (`Never`)     failed
    anything else                                                  starting, with the reason

Pods that were evicted, or that their node turned away, have ended for good and are no servers:
their Deployment has made others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from trainyard.errors import BadInput, CacheMiss, Refused
from trainyard.kubernetes.client import Object
from trainyard.serving.kubernetes.manifests import POD_FOLDER, RESTORE, SERVER, SERVER_PORT
from trainyard.serving.process import explain_exit
from trainyard.serving.protocol import ServerState, ServerStatus

FAILED_AFTER = 3
"""Starts of a server that ended before the next one has to wait."""
RESTORE_FAILED_AFTER = 6
"""Tries of a restore that another try may mend: some minutes, with Kubernetes' pauses."""

_HOPELESS = frozenset({BadInput.exit_code, Refused.exit_code, CacheMiss.exit_code})
_NO_IMAGE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable"}
)
_WRONG_IMAGE = frozenset({"InvalidImageName", "ErrImageNeverPull"})
_BACK_OFF = "CrashLoopBackOff"
_PATIENCE = {
    "ContainerCreating": "Its volumes are being mounted, or its image is being pulled.",
    "PodInitializing": "Its container is being made.",
}
_STEPS = {
    RESTORE: "Its release is being verified and copied.",
    POD_FOLDER: "Its folder on the node is being made.",
}

Found = tuple[ServerState, str]


def server_status(
    pod: Object, release_id: str, *, container: str = SERVER, port: int = SERVER_PORT
) -> ServerStatus | None:
    """Return the server in a pod; None if the pod has ended for good.

    Args:
        pod: as the API has it.
        release_id: what it serves.
        container: name of the container that serves.
        port: where that one listens.
    """
    status = pod.get("status") or {}
    metadata = pod["metadata"]
    deleted = bool(metadata.get("deletionTimestamp"))
    if status.get("phase") in ("Failed", "Succeeded") and not deleted:
        return None
    server = _named(status.get("containerStatuses"), container)
    running = (server.get("state") or {}).get("running") or {}
    state, message = _stopping() if deleted else _look(status, server)
    return ServerStatus(
        name=metadata["name"],
        release_id=release_id,
        state=state,
        url=_url(str(status.get("podIP") or ""), port),
        started_at=_moment(running.get("startedAt")),
        restarts=int(server.get("restartCount") or 0),
        message=message,
    )


def not_begun(deployment: Object, release_id: str, pods: int) -> list[ServerStatus]:
    """Return the servers of a Deployment for which there is no pod, with the reason.

    Args:
        deployment: as the API has it.
        release_id: what it serves.
        pods: how many of its servers have one.
    """
    metadata = deployment["metadata"]
    if metadata.get("deletionTimestamp"):
        return []
    wished = int((deployment.get("spec") or {}).get("replicas") or 0)
    message = "The cluster has not begun with it yet."
    conditions = (deployment.get("status") or {}).get("conditions") or ()
    failure = next((c for c in conditions if c.get("type") == "ReplicaFailure"), None)
    if failure is not None and failure.get("status") == "True":
        message = f"The cluster makes no pod for it: {failure.get('message')}"
    return [
        ServerStatus(
            f"{metadata['name']}-without-pod-{index}", release_id, "starting", "", None, 0, message
        )
        for index in range(pods, wished)
    ]


def _stopping() -> Found:
    return "stopping", "It finishes its requests."


def _look(status: Mapping[str, Any], server: Mapping[str, Any]) -> Found:
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    ready = conditions.get("Ready") or {}
    if ready.get("status") == "True":
        return "ready", "It passes its health checks."
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return "starting", f"No node takes it: {scheduled.get('message') or 'no reason is given'}"
    if not scheduled:
        return "starting", "It waits for the scheduler."
    for container in status.get("initContainerStatuses") or ():
        found = _init(container)
        if found is not None:
            return found
    return _serving(server)


def _init(container: Mapping[str, Any]) -> Found | None:
    """Return why an init container holds the pod up; None if it does not."""
    state, name = container.get("state") or {}, str(container.get("name"))
    ended = state.get("terminated") or {}
    if ended.get("exitCode") == 0 or ("running" in state and container.get("started")):
        # It is done; or it is a sidecar, which runs on.
        return None
    failure = ended or (container.get("lastState") or {}).get("terminated") or {}
    if failure and failure.get("exitCode") != 0:
        code, tries = failure.get("exitCode"), int(container.get("restartCount") or 0) + bool(ended)
        message = f"Its container {name} ended with exit code {code}: {_words(failure)}"
        hopeless = name == RESTORE and code in _HOPELESS
        return ("failed" if hopeless or tries >= RESTORE_FAILED_AFTER else "starting"), message
    waiting = state.get("waiting")
    if waiting is not None:
        return _waiting(waiting)
    return "starting", _STEPS.get(name, f"Its container {name} runs.")


def _serving(server: Mapping[str, Any]) -> Found:
    state = server.get("state") or {}
    before = (server.get("lastState") or {}).get("terminated")
    if "running" in state:
        if server.get("started"):
            return "unhealthy", "It does not pass its health checks."
        again = f" It ended before: {_explained(before)}" if before else ""
        return "starting", f"It starts.{again}"
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (before if waiting.get("reason") == _BACK_OFF else None)
    if ended:
        restarts = int(server.get("restartCount") or 0)
        failed = restarts >= FAILED_AFTER
        tried = f" It was started again {restarts} times." if restarts > 1 else ""
        return ("failed" if failed else "starting"), f"{_explained(ended)}{tried}"
    return _waiting(waiting)


def _waiting(waiting: Mapping[str, Any]) -> Found:
    reason, said = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    why = f"{reason}: {said}" if said else reason
    if reason in _WRONG_IMAGE:
        return "failed", f"Its image cannot be used: {why}"
    if reason in _NO_IMAGE:
        return "starting", f"Its image cannot be pulled: {why}"
    return "starting", _PATIENCE.get(reason, f"Its container waits: {why or 'no reason is given'}")


def _explained(ended: Mapping[str, Any]) -> str:
    """Return why a server ended, from its exit code and the end of its log."""
    code = ended.get("exitCode")
    if ended.get("reason") == "OOMKilled":
        code = 137
    if ended.get("reason") in ("StartError", "ContainerCannotRun"):
        return f"Its container cannot start: {ended.get('message')}"
    signalled = 128 - int(code) if code is not None and int(code) > 128 else code
    return str(explain_exit(str(ended.get("message") or ""), signalled))


def _words(ended: Mapping[str, Any]) -> str:
    """Return what a container of ours said last: its error if it printed one."""
    lines = [line.strip() for line in str(ended.get("message") or "").splitlines() if line.strip()]
    errors = [line.removeprefix("Error:").strip() for line in lines if line.startswith("Error:")]
    if errors:
        return errors[-1]
    return lines[-1] if lines else str(ended.get("reason") or "it said nothing")


def _named(statuses: Sequence[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any]:
    found: Iterator[Mapping[str, Any]] = (s for s in statuses or () if s.get("name") == name)
    return next(found, {})


def _url(address: str, port: int) -> str:
    if not address:
        return ""
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}"


def _moment(text: Any) -> datetime | None:
    return datetime.fromisoformat(str(text)) if text else None
