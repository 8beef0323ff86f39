"""The cluster's API: requests in, plain dicts out, failures as our own errors.

Kubernetes' own client brings the connection (kubeconfig, tokens that are renewed, certificates);
objects stay dicts as in a manifest, so that what is rendered, applied and read are the same thing.
All calls block.

::

    answer                                   error
    401                                      Transient: tokens are renewed between tries
    403, over a quota                        OutOfCapacity
    403                                      BadInput: a right is missing, with the right's name
    404                                      NotFound; `get` returns None for an object
    404 of a whole kind                      MissingKind: the CRD is not installed
    409                                      Conflict
    422 of a JSON Patch                      Conflict: one of its tests did not hold
    400, 422 and other 4xx                   BadInput
    500 of what cannot be applied            BadInput: a field has another type than its kind says
    429, 5xx, no connection, no answer       Transient
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainyard.errors import BadInput, Conflict, NotFound, OutOfCapacity, TrainyardError, Transient
from trainyard.kubernetes.kinds import Kind
from trainyard.kubernetes.labels import FIELD_MANAGER, selector
from trainyard.settings import Settings

Object = dict[str, Any]
"""One object as in a manifest."""

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_NOT_OF_ITS_KIND = "failed to create typed patch object"
"""How API servers begin to refuse an apply whose fields do not fit their kind, with a 500."""
PAGE = 500
"""Objects of one answer to a list."""


class MissingKind(BadInput):
    """The cluster does not know a kind of object: its CRD is not installed."""


class Cluster:
    """One cluster, as one user of it."""

    def __init__(self, api_client: Any, *, timeout_s: float = 15.0) -> None:
        """Use a connection of Kubernetes' own client.

        Args:
            api_client: a `kubernetes.client.ApiClient`.
            timeout_s: that a request may take.
        """
        self._api = api_client
        self._timeout_s = timeout_s

    @classmethod
    def connect(cls, settings: Settings, context: str = "") -> Cluster:
        """Return the cluster that the settings and an environment's `context` name.

        Inside a cluster, without a kubeconfig, it is that cluster.

        Raises:
            BadInput: there is no usable kubeconfig, or it has no such context.
        """
        from kubernetes import client, config

        configuration = client.Configuration()
        # One try: who calls us decides what to do next, and a guard must not sleep in a request.
        configuration.retries = False
        try:
            if not context and settings.kubeconfig is None and in_cluster():
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(
                    config_file=str(settings.kubeconfig) if settings.kubeconfig else None,
                    context=context or None,
                    client_configuration=configuration,
                )
        except (config.ConfigException, OSError) as error:
            raise BadInput(
                f"The cluster cannot be found: {error}",
                hint="Set TRAINYARD_KUBECONFIG (or KUBECONFIG) to a kubeconfig with that context, "
                "or run inside the cluster.",
            ) from error
        return cls(client.ApiClient(configuration), timeout_s=settings.kube_timeout_s)

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """Return an object, or None if there is none of that name.

        Raises:
            MissingKind: the cluster does not know the kind.
            TrainyardError: as in the table above.
        """
        try:
            return self._request("GET", kind.path(namespace, name), what=_what(kind, name))
        except NotFound:
            return None

    def list(
        self, kind: Kind, namespace: str = "", *, labels: Mapping[str, str] | None = None
    ) -> tuple[list[Object], str]:
        """Return all objects with these labels, and the collection's resource version."""
        query: dict[str, str] = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = selector(labels)
        found: list[Object] = []
        while True:
            answer = self._request("GET", kind.path(namespace), query=query, what=_what(kind))
            for item in answer.get("items") or []:
                # A list leaves out what all of its items have in common.
                found.append({"apiVersion": kind.api_version, "kind": kind.name, **item})
            metadata = answer.get("metadata") or {}
            if not metadata.get("continue"):
                return found, str(metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    def create(self, kind: Kind, body: Object) -> Object:
        """Create an object. Raises Conflict if there is one of that name."""
        metadata = body["metadata"]
        path = kind.path(metadata.get("namespace", ""))
        return self._request("POST", path, body=body, what=_what(kind, metadata.get("name", "")))

    def replace(self, kind: Kind, body: Object) -> Object:
        """Replace an object; with a `resourceVersion` only if it is still that version.

        Raises:
            Conflict: somebody else changed it.
        """
        metadata = body["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        return self._request("PUT", path, body=body, what=_what(kind, metadata["name"]))

    def apply(
        self, kind: Kind, body: Object, *, manager: str = FIELD_MANAGER, dry_run: bool = False
    ) -> Object:
        """Make the fields of `body` so (server-side apply); others keep who manages them.

        Fields that somebody else manages are taken over: what we apply, we own.
        """
        metadata = body["metadata"]
        query = {"fieldManager": manager, "force": "true"}
        if dry_run:
            query["dryRun"] = "All"
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        what = _what(kind, metadata["name"])
        return self._request("PATCH", path, query=query, body=body, content=APPLY_PATCH, what=what)

    def json_patch(
        self,
        kind: Kind,
        name: str,
        operations: Sequence[Mapping[str, Any]],
        *,
        namespace: str = "",
        manager: str = FIELD_MANAGER,
    ) -> Object:
        """Change an object in one write.

        Raises:
            Conflict: a `test` of the patch did not hold; read again and plan again.
        """
        return self._request(
            "PATCH",
            kind.path(namespace, name),
            query={"fieldManager": manager},
            body=list(operations),
            content=JSON_PATCH,
            what=_what(kind, name),
        )

    def merge_patch(
        self,
        kind: Kind,
        name: str,
        body: Object,
        *,
        namespace: str = "",
        manager: str = FIELD_MANAGER,
        subresource: str = "",
    ) -> Object:
        """Set some fields of an object; None removes one."""
        return self._request(
            "PATCH",
            kind.path(namespace, name, subresource),
            query={"fieldManager": manager},
            body=body,
            content=MERGE_PATCH,
            what=_what(kind, name),
        )

    def delete(self, kind: Kind, name: str, namespace: str = "") -> bool:
        """Remove an object and what it owns; tell whether there was one."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            self._request(
                "DELETE", kind.path(namespace, name), body=options, what=_what(kind, name)
            )
        except NotFound:
            return False
        return True

    def watch(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        resource_version: str,
        labels: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> Iterator[tuple[str, Object]]:
        """Yield changes (`ADDED`, `MODIFIED`, `DELETED`) until the server ends the watch.

        A watch may end or break at any time: list again, then watch from there.

        Raises:
            Conflict: `resource_version` is too old for the server.
            Transient: the watch broke.
        """
        query = {
            "watch": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, int(timeout_s))),
        }
        if labels:
            query["labelSelector"] = selector(labels)
        what = f"The watch of {kind.plural}"
        response = self._open(
            "GET", kind.path(namespace), query=query, what=what, timeout_s=timeout_s + 5.0
        )
        try:
            for line in _lines(response, what):
                event = _parsed(line, what)
                if event.get("type") == "ERROR":
                    status = event.get("object") or {}
                    raise _error(int(status.get("code") or 500), status, what)
                if event.get("type") != "BOOKMARK":
                    yield str(event["type"]), event["object"]
        finally:
            response.release_conn()

    def logs(
        self, name: str, namespace: str, *, container: str = "", tail_lines: int = 200,
        previous: bool = False,
    ) -> str:  # fmt: skip
        """Return the end of a container's log; empty if it has none (yet)."""
        query = {"tailLines": str(tail_lines)}
        if container:
            query["container"] = container
        if previous:
            query["previous"] = "true"
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
        try:
            response = self._open("GET", path, query=query, what=f"The log of pod {name}")
        except (NotFound, BadInput):
            # A container that has not started has no log, which the API calls a bad request.
            return ""
        return _read(response, f"The log of pod {name}").decode("utf-8", "replace")

    def version(self) -> str:
        """Return the version of the API server, such as `v1.36.1`."""
        return str(self._request("GET", "/version", what="The version")["gitVersion"])

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
        what: str,
    ) -> Object:
        response = self._open(method, path, query=query, body=body, content=content, what=what)
        return _parsed(_read(response, what), what)

    def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
        what: str,
        timeout_s: float | None = None,
    ) -> Any:
        """Send a request; return the response with its body still to be read."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content
        try:
            response = self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=timeout_s or self._timeout_s,
            )
        except ApiException as error:
            raise api_error(error, what) from error
        except (HTTPError, OSError) as error:
            raise Transient(f"{what}: the cluster does not answer: {error}") from error
        return response


def api_error(error: Any, what: str) -> TrainyardError:
    """Return our error for an `ApiException` of Kubernetes' own client."""
    return _error(error.status or 0, _status_of(error.body), what)


def in_cluster() -> bool:
    """Tell whether this process runs in a pod of a cluster."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _what(kind: Kind, name: str = "") -> str:
    return f"{kind.name} {name}" if name else kind.name


def _read(response: Any, what: str) -> bytes:
    """Return the whole body of a response."""
    from urllib3.exceptions import HTTPError

    try:
        body: bytes = response.data
    except (HTTPError, OSError) as error:
        raise Transient(f"{what}: the answer broke off: {error}") from error
    finally:
        response.release_conn()
    return body


def _lines(response: Any, what: str) -> Iterator[bytes]:
    """Yield the lines of a response as they come."""
    from urllib3.exceptions import HTTPError

    rest = b""
    try:
        for chunk in response.stream(amt=None, decode_content=True):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line for line in whole if line.strip())
    except (HTTPError, OSError) as error:
        raise Transient(f"{what} broke: {error}") from error


def _parsed(data: bytes, what: str) -> Object:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise Transient(f"{what}: the answer is no JSON.") from error
    if not isinstance(parsed, dict):
        raise Transient(f"{what}: the answer is no object.")
    return parsed


def _status_of(body: Any) -> Object:
    """Return the `Status` object in an error's body, empty if there is none."""
    try:
        parsed = json.loads(body or b"")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _error(code: int, status: Mapping[str, Any], what: str) -> TrainyardError:
    """Return the error for an answer of the API server."""
    said = str(status.get("message") or f"answer {code or 'missing'}")
    message = f"{what}: {said}"
    match code:
        case 404 if not (status.get("details") or {}).get("name"):
            return MissingKind(
                f"{message} (the cluster does not know this kind)",
                hint="Install its CRD: the Gateway API's for routes, KEDA's for ScaledObjects.",
            )
        case 404:
            return NotFound(message)
        case 403 if "exceeded quota" in said:
            return OutOfCapacity(message, hint="Raise the namespace's quota, or free some of it.")
        case 403:
            return BadInput(
                message, hint="Give this service account the right; `k8s/` has the roles."
            )
        case 409 | 410:
            return Conflict(message)
        case 422 if status.get("reason") == "Invalid" and not (status.get("details") or {}).get(
            "causes"
        ):
            return Conflict(message)
        case 500 if _NOT_OF_ITS_KIND in said:
            return BadInput(message)
        case _ if 400 <= code < 500 and code not in (401, 408, 429):
            return BadInput(message)
        case _:
            return Transient(message)
