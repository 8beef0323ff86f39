"""Exports of releases to an OCI registry such as Amazon ECR: the bundle with the signed release.

One release is one artifact, tagged with its id. Its layers are the envelope as it lies in the
store, the bundle's manifest, and each file of the bundle under its own digest, so that a registry
keeps once what several bundles share and a second push sends nothing. Layers carry their paths as
titles: `oras pull` restores `release.intoto.json` and the folder `bundle/`. Weights are not in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.release import Release
from trainyard.errors import BadInput, CorruptFile, Transient
from trainyard.releases import read_pinned
from trainyard.settings import Settings
from trainyard.store.disk import explained
from trainyard.store.layout import bundle_manifest_key, bundle_prefix, release_key
from trainyard.store.protocol import Store
from trainyard.store.transfer import pump

ARTIFACT_TYPE = "application/vnd.trainyard.release.v1"
ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
BUNDLE_MANIFEST_TYPE = "application/vnd.trainyard.bundle.manifest.v1+json"
BUNDLE_FILE_TYPE = "application/vnd.trainyard.bundle.file.v1"

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_TITLE = "org.opencontainers.image.title"

_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_TARGET = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?)/"
    rf"(?P<repository>{_PART}(/{_PART})*)"
)
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_ECR = re.compile(r"\d{12}\.dkr\.ecr\.[^.]+\.amazonaws\.com")

_CHUNK_BYTES = 16 << 20
_TIMEOUT_S = (10, 300)
"""To connect, and between two answers."""


@dataclass(frozen=True)
class Registry:
    """Where releases are exported to."""

    host: str
    repository: str

    @classmethod
    def parse(cls, text: str) -> Registry:
        """Return the registry of `oci://host/repository`. Raises BadInput."""
        match = _TARGET.fullmatch(text)
        if match is None or not re.search(r"[.:]|^localhost$", match["host"]):
            raise BadInput(
                f"{text!r} names no repository of an OCI registry.",
                hint="Write `oci://HOST/REPOSITORY`, such as oci://registry.example:5000/models; "
                "the tag is the release's id.",
            )
        return cls(match["host"], match["repository"])

    def reference(self, tag: str) -> str:
        """Return `host/repository:tag`."""
        return f"{self.host}/{self.repository}:{tag}"


@dataclass(frozen=True)
class Exported:
    """An export."""

    reference: str
    digest: str
    """`sha256:…` of the artifact's manifest."""
    pushed: int
    """How many blobs were sent; those that the registry had are not."""
    reused: bool
    """The registry had all of it."""


@dataclass(frozen=True)
class _Layer:
    media_type: str
    path: str
    size: int
    sha256: str
    open: Callable[[], BinaryIO]

    @property
    def descriptor(self) -> dict[str, Any]:
        return {
            "mediaType": self.media_type,
            "digest": f"sha256:{self.sha256}",
            "size": self.size,
            "annotations": {_TITLE: self.path},
        }


def export_release(
    store: Store,
    release: Release,
    registry: Registry,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Push a release and its bundle to a registry; what it has already is not sent again.

    The manifest comes last: a push that was killed leaves nothing that can be pulled, and the next
    one goes on where it stopped.

    Args:
        store: where they are.
        release: a verified release.
        registry: where to.
        settings: hold the user and the scratch folder.
        say: told what happens.

    Raises:
        BadInput: the registry refuses, or holds another artifact under that tag.
        NotFound: the bundle is not in the store.
        CorruptFile: a file of it does not match its hash.
        Transient: the registry or the network fails now.
    """
    layers = _layers(store, release)
    manifest = _manifest(release, layers)
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    reference = registry.reference(release.release_id)
    with _explained(registry):
        remote = _Remote(registry, release.release_id, settings)
        stored = remote.manifest_digest()
        if stored == digest:
            return Exported(reference, digest, 0, reused=True)
        if stored:
            raise BadInput(
                f"{reference} holds another artifact ({stored}).",
                hint="If the release was signed again, delete that tag in the registry first.",
            )
        empty = _Layer(_EMPTY_TYPE, "", 2, hashlib.sha256(b"{}").hexdigest(), lambda: _bytes(b"{}"))
        distinct = {layer.sha256: layer for layer in (*layers, empty)}
        missing = [layer for layer in distinct.values() if not remote.has(layer)]
        for number, layer in enumerate(missing, start=1):
            say(f"Pushing {number} of {len(missing)}: {layer.path or 'configuration'}")
            with _spooled(layer, settings.work_root) as file:
                remote.push(layer, file)
        remote.push_manifest(manifest)
    return Exported(reference, digest, len(missing), reused=False)


def _layers(store: Store, release: Release) -> tuple[_Layer, ...]:
    envelope = store.read(release_key(release.model, release.release_id)).data
    manifest_key = bundle_manifest_key(release.compile_key)
    bundle = read_pinned(store, release, "bundle-manifest", manifest_key, BundleManifest)
    if not files_digest(bundle.files) == bundle.digest == release.bundle_digest:
        raise CorruptFile(
            f"{manifest_key} is not the bundle that release {release.release_id} was made from.",
            hint="Somebody replaced stored files; make a new release.",
        )
    prefix = bundle_prefix(release.compile_key)
    files = (
        _Layer(
            BUNDLE_FILE_TYPE,
            f"bundle/{entry.path}",
            entry.size,
            entry.sha256,
            partial(store.open, f"{prefix}/{entry.path}"),
        )
        for entry in bundle.files
    )
    return (
        _document(ENVELOPE_TYPE, "release.intoto.json", envelope),
        _document(BUNDLE_MANIFEST_TYPE, "bundle/manifest.json", store.read(manifest_key).data),
        *files,
    )


def _document(media_type: str, path: str, data: bytes) -> _Layer:
    sha256 = hashlib.sha256(data).hexdigest()
    return _Layer(media_type, path, len(data), sha256, partial(_bytes, data))


def _bytes(data: bytes) -> BinaryIO:
    return io.BytesIO(data)


def _manifest(release: Release, layers: tuple[_Layer, ...]) -> bytes:
    """Return the artifact's manifest; the same release gives the same bytes."""
    value = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {
            "mediaType": _EMPTY_TYPE,
            "digest": f"sha256:{hashlib.sha256(b'{}').hexdigest()}",
            "size": 2,
        },
        "layers": [layer.descriptor for layer in layers],
        "annotations": {
            "org.opencontainers.image.created": release.created_at.isoformat(),
            "org.opencontainers.image.version": release.release_id,
            "trainyard.compile-key": release.compile_key,
            "trainyard.lane": release.lane,
        },
    }
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


@contextmanager
def _spooled(layer: _Layer, folder: Path) -> Iterator[Path]:
    """Give a local file with the content of a layer, checked against its hash."""
    with ExitStack() as stack:
        with explained("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix="export-"))
        with layer.open() as stream, explained("write", folder):
            content = pump(stream, file.write)
            file.flush()
        if (content.size, content.sha256) != (layer.size, layer.sha256):
            raise CorruptFile(
                f"{layer.path} in the store does not match the hash in its manifest.",
                hint="Bring it back from a backup, or remove the bundle and release again.",
            )
        yield Path(file.name)


class _Remote:
    """One tag of a repository, through oras."""

    def __init__(self, registry: Registry, tag: str, settings: Settings) -> None:
        try:
            from oras.container import Container
            from oras.provider import Registry as OrasRegistry
        except ImportError as error:
            raise BadInput(
                "Exports to a registry need the Python package `oras`, which is missing here.",
                hint="Run this where the control plane is installed (`make setup`: .venv).",
            ) from error

        class OneTry(OrasRegistry):  # type: ignore[misc]
            """Fails at once: oras itself would sleep for minutes, even over a wrong password."""

            def do_request(self, *args: Any, **kwargs: Any) -> Any:
                return OrasRegistry.do_request.__wrapped__(self, *args, **kwargs)

        insecure = bool(_LOOPBACK.fullmatch(registry.host))
        self._registry = registry
        self._base = f"{'http' if insecure else 'https'}://"
        self._container = Container(registry.reference(tag))
        backend = self._login_kind()
        self._client = OneTry(hostname=registry.host, insecure=insecure, auth_backend=backend)
        session = self._client.session
        session.request = partial(session.request, timeout=_TIMEOUT_S)
        self._client.auth.load_configs(self._container, configs=_docker_config())
        if settings.registry_username:
            password = settings.registry_password.get_secret_value()
            self._client.auth.set_basic_auth(settings.registry_username, password)
        elif backend == "basic" and not getattr(self._client.auth, "_basic_auth", ""):
            raise _login_needed(registry)

    def manifest_digest(self) -> str:
        """Return the digest of what the tag names, or nothing."""
        url = f"{self._base}{self._container.manifest_url()}"
        response = self._client.do_request(url, "HEAD", headers={"Accept": _MANIFEST_TYPE})
        if response.status_code == 404:
            return ""
        self._demand(response)
        return str(response.headers.get("Docker-Content-Digest", "unknown"))

    def has(self, layer: _Layer) -> bool:
        return bool(self._client.blob_exists(layer.descriptor, self._container))

    def push(self, layer: _Layer, file: Path) -> None:
        descriptor = layer.descriptor
        if layer.size > _CHUNK_BYTES:
            response = self._client.chunked_upload(
                str(file), self._container, descriptor, chunk_size=_CHUNK_BYTES
            )
        else:
            response = self._client.put_upload(str(file), self._container, descriptor)
        self._demand(response)

    def push_manifest(self, manifest: bytes) -> None:
        url = f"{self._base}{self._container.manifest_url()}"
        headers = {"Content-Type": _MANIFEST_TYPE}
        self._demand(self._client.do_request(url, "PUT", data=manifest, headers=headers))

    def _login_kind(self) -> str:
        """Return how the registry wants to be logged in to: oras has a backend for each way."""
        import httpx

        if _ECR.fullmatch(self._registry.host):
            return "ecr"
        response = httpx.get(f"{self._base}{self._registry.host}/v2/", timeout=_TIMEOUT_S[0])
        if response.status_code >= 500:
            raise _unavailable(self._registry, response.status_code)
        challenge = response.headers.get("WWW-Authenticate", "")
        return "basic" if challenge.lower().startswith("basic") else "token"

    def _demand(self, response: Any) -> None:
        """Raise an error of ours unless the registry did as it was asked."""
        status = response.status_code
        if status in (200, 201, 202, 204):
            return
        if status in (401, 403):
            raise _login_needed(self._registry)
        if status == 429 or status >= 500:
            raise _unavailable(self._registry, status)
        raise BadInput(
            f"The registry {self._registry.host} refuses {self._container}: {status} "
            f"{response.text[:200].strip()}".rstrip()
            + ".",
            hint="Does the repository exist there? ECR makes none by itself: "
            "`aws ecr create-repository`.",
        )


def _docker_config() -> list[str]:
    """Return Docker's configuration where it is not in its usual place, which oras knows."""
    folder = os.environ.get("DOCKER_CONFIG", "")
    path = Path(folder, "config.json")
    return [str(path)] if folder and path.exists() else []


def _login_needed(registry: Registry) -> BadInput:
    return BadInput(
        f"The registry {registry.host} does not let us push to {registry.repository}.",
        hint="Log in (`docker login`), or set TRAINYARD_REGISTRY_USERNAME and "
        "TRAINYARD_REGISTRY_PASSWORD; for ECR give AWS credentials with the right to push.",
    )


def _unavailable(registry: Registry, status: int) -> Transient:
    return Transient(f"The registry {registry.host} answers {status}.", hint="Try again later.")


@contextmanager
def _explained(registry: Registry) -> Iterator[None]:
    """Turn what oras, its HTTP client and AWS's raise inside the block into errors of ours."""
    import httpx
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ClientError) as error:
        raise _login_needed(registry) from error
    except BotoCoreError as error:
        raise Transient(
            f"AWS gives no token for the registry {registry.host} now: {error}",
            hint="Check the network, then try again.",
        ) from error
    except (OSError, httpx.HTTPError) as error:
        # `requests` derives its errors from OSError.
        raise Transient(
            f"The registry {registry.host} cannot be reached or fails now: {error}.",
            hint="Check its name and the network, then try again.",
        ) from error
    except ValueError as error:
        # What oras raises where it can't log in, or where an answer makes no sense.
        if "authentication" in str(error):
            raise _login_needed(registry) from error
        raise Transient(
            f"The registry {registry.host} gave an answer that makes no sense: {error}.",
            hint="Try again; if it lasts, look at the registry's log.",
        ) from error
