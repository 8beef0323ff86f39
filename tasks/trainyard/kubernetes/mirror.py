"""A copy of some objects of a cluster, kept up to date by a watch.

A watch may break at any time, and an API server may be away for minutes. The copy then stays as it
was last seen, and is made anew by a list as soon as that is possible; until a watch works again,
each try is one more list. So nothing depends on watches but how soon a change is seen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from trainyard.errors import Conflict, TrainyardError
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import Kind

log = logging.getLogger(__name__)

WATCH_S = 20.0
"""Seconds after which a watch is begun anew."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 2.0
"""Seconds between tries while no watch works."""


class Mirror:
    """The copy. Its thread is a daemon: it may be in a request when the process ends."""

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        namespace: str,
        *,
        labels: Mapping[str, str] | None = None,
        changed: Callable[[], None] = lambda: None,
        watch_s: float = WATCH_S,
    ) -> None:
        """Copy the objects of a namespace that have these labels.

        Args:
            cluster: where they are.
            kind: of objects.
            namespace: of the objects.
            labels: all of which they have.
            changed: called after each change, from another thread; must not wait.
            watch_s: seconds after which a watch is begun anew.
        """
        self._cluster = cluster
        self._kind = kind
        self._namespace = namespace
        self._labels = labels
        self._changed = changed
        self._watch_s = watch_s
        self._objects: dict[str, Object] = {}
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._heard_at: float | None = None
        self._pause_s = FIRST_PAUSE_S

    @property
    def objects(self) -> dict[str, Object]:
        """The objects by name, as last seen; they are not to be changed."""
        with self._guard:
            return dict(self._objects)

    @property
    def synced(self) -> bool:
        """Have the objects been listed at least once?"""
        return self._heard_at is not None

    @property
    def age_s(self) -> float:
        """Seconds since the API server last answered; infinite if it never has."""
        return float("inf") if self._heard_at is None else time.monotonic() - self._heard_at

    def start(self) -> Mirror:
        """Begin to copy, in a thread."""
        name = f"mirror-{self._kind.plural}"
        threading.Thread(target=self._run, name=name, daemon=True).start()
        return self

    def stop(self) -> None:
        """End the copying; does not wait for a request under way."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._follow(self._list())
            except Conflict:
                log.debug("The version of %s is too old to watch from", self._kind.plural)
            except TrainyardError as error:
                log.warning("%s cannot be watched: %s", self._kind.plural, error)
            except Exception:
                # A thread that has died would leave a copy that is never mended, and tell nobody.
                log.exception("%s cannot be watched: nobody foresaw this", self._kind.plural)
            self._stopped.wait(self._pause_s)
            self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)

    def _list(self) -> str:
        found, version = self._cluster.list(self._kind, self._namespace, labels=self._labels)
        with self._guard:
            self._objects = {body["metadata"]["name"]: body for body in found}
        self._heard()
        return version

    def _follow(self, version: str) -> None:
        """Take over changes for as long as watches work."""
        while not self._stopped.is_set():
            for type_, body in self._cluster.watch(
                self._kind,
                self._namespace,
                resource_version=version,
                labels=self._labels,
                timeout_s=self._watch_s,
            ):
                version = body["metadata"]["resourceVersion"]
                self._take(type_, body)
                self._pause_s = FIRST_PAUSE_S
                if self._stopped.is_set():
                    return
            self._heard()
            # It has ended as it should, but perhaps at once.
            self._pause_s = FIRST_PAUSE_S
            self._stopped.wait(self._pause_s)

    def _take(self, type_: str, body: Object) -> None:
        with self._guard:
            if type_ == "DELETED":
                self._objects.pop(body["metadata"]["name"], None)
            else:
                self._objects[body["metadata"]["name"]] = body
        self._heard()

    def _heard(self) -> None:
        self._heard_at = time.monotonic()
        self._changed()
