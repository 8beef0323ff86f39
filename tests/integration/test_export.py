"""A release goes to a real OCI registry and comes back the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import requests
from tests.serving_world import MODEL, PATIENCE_S, make_release

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.release import Release
from trainyard.errors import BadInput, CorruptFile, Transient
from trainyard.export import Registry, _explained, _Remote, export_release
from trainyard.releases import read_pinned
from trainyard.serving.records import choose_port
from trainyard.settings import Settings
from trainyard.signing.envelope import open_envelope
from trainyard.signing.keys import trusted_keys
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key, bundle_prefix, release_key

pytestmark = pytest.mark.integration

BCRYPT_OF_SECRET = "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW"


@dataclass(frozen=True)
class RunningRegistry:
    """Debian's docker-registry on loopback, with its files."""

    host: str
    root: Path

    def uploads(self) -> int:
        """Return how many blobs it holds."""
        return len(list(self.root.glob("docker/registry/v2/blobs/sha256/*/*")))


def start_registry(folder: Path, auth: str = "") -> tuple[RunningRegistry, subprocess.Popen[bytes]]:
    program = shutil.which("docker-registry")
    assert program, "Debian's package docker-registry is not installed: see .ci/system-packages"
    port = choose_port()
    root = folder / "registry"
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {root}\n"
        f"http:\n  addr: 127.0.0.1:{port}\nlog:\n  level: error\n{auth}"
    )
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    registry = RunningRegistry(f"127.0.0.1:{port}", root)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(f"http://{registry.host}/v2/")
            return registry, process
        except httpx.TransportError:
            assert process.poll() is None, (folder / "registry.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    registry, process = start_registry(tmp_path_factory.mktemp("registry"))
    yield registry
    stop(process)


@pytest.fixture(autouse=True)
def no_docker_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def store(settings: Settings) -> FolderStore:
    return FolderStore(settings.store_root)


@pytest.fixture
def release(settings: Settings, store: FolderStore) -> Release:
    return make_release(settings, store)


def repository(running: RunningRegistry, tmp_path: Path) -> Registry:
    """Return a repository that no other test uses."""
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    return Registry.parse(f"oci://{running.host}/models/{name}")


def pull(reference: str, into: Path) -> dict[str, bytes]:
    """Return what the standard client restores of an artifact, by path."""
    from oras.client import OrasClient

    OrasClient(insecure=True).pull(target=reference, outdir=str(into))
    return {
        path.relative_to(into).as_posix(): path.read_bytes()
        for path in into.rglob("*")
        if path.is_file()
    }


def test_what_was_pushed_comes_back_the_same(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    done = export_release(store, release, repository(running, tmp_path), settings)

    assert done.reference.endswith(f":{release.release_id}")
    assert (done.reused, done.pushed) == (False, 4)
    pulled = pull(done.reference, tmp_path / "pulled")
    stored = store.read(release_key(MODEL, release.release_id)).data
    manifest = store.read(bundle_manifest_key(release.compile_key)).data
    assert pulled["release.intoto.json"] == stored
    assert pulled["bundle/manifest.json"] == manifest
    files = BundleManifest.model_validate_json(manifest).files
    assert {path for path in pulled if path.startswith("bundle/")} == {
        "bundle/manifest.json",
        *(f"bundle/{entry.path}" for entry in files),
    }
    for entry in files:
        assert hashlib.sha256(pulled[f"bundle/{entry.path}"]).hexdigest() == entry.sha256
    open_envelope(pulled["release.intoto.json"], "what was pulled", trusted_keys(settings))


def test_the_digest_is_that_of_the_registry(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    registry = repository(running, tmp_path)

    done = export_release(store, release, registry, settings)

    url = f"http://{registry.host}/v2/{registry.repository}/manifests/{done.digest}"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    answer = httpx.get(url, headers=accept, timeout=PATIENCE_S)
    assert answer.headers["Docker-Content-Digest"] == done.digest
    assert answer.json()["artifactType"] == "application/vnd.trainyard.release.v1"
    layers = answer.json()["layers"]
    assert layers[0]["mediaType"] == "application/vnd.dsse.envelope.v1+json"


def test_a_second_push_sends_nothing(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    registry = repository(running, tmp_path)
    first = export_release(store, release, registry, settings)
    blobs = running.uploads()

    second = export_release(store, release, registry, settings)

    assert (second.digest, second.pushed, second.reused) == (first.digest, 0, True)
    assert running.uploads() == blobs


def test_a_push_that_was_cut_goes_on_where_it_stopped(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    registry = repository(running, tmp_path)
    said: list[str] = []

    def die(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_release(store, release, registry, settings, say=die)
    url = f"http://{registry.host}/v2/{registry.repository}/manifests/{release.release_id}"
    assert httpx.get(url, timeout=PATIENCE_S).status_code == 404

    assert export_release(store, release, registry, settings).pushed == 2
    assert list(settings.work_root.iterdir()) == []


def test_a_large_file_goes_in_pieces(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainyard.export._CHUNK_BYTES", 1500)

    done = export_release(store, release, repository(running, tmp_path), settings)

    pulled = pull(done.reference, tmp_path / "pulled")
    stored = store.read(release_key(MODEL, release.release_id)).data
    assert pulled["release.intoto.json"] == stored


def test_a_damaged_file_is_found_before_it_is_sent(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    manifest = read_pinned(
        store,
        release,
        "bundle-manifest",
        bundle_manifest_key(release.compile_key),
        BundleManifest,
    )
    path = manifest.files[0].path
    damaged = store.local_path(f"{bundle_prefix(release.compile_key)}/{path}")
    assert damaged is not None
    damaged.chmod(0o644)
    damaged.write_bytes(b"c0de")

    with pytest.raises(CorruptFile, match=f"bundle/{path}"):
        export_release(store, release, repository(running, tmp_path), settings)


def test_another_artifact_under_the_tag_is_not_replaced(
    running: RunningRegistry,
    settings: Settings,
    store: FolderStore,
    release: Release,
    tmp_path: Path,
) -> None:
    registry = repository(running, tmp_path)
    export_release(store, release, registry, settings)
    other = Settings(home=tmp_path / "other")
    others = FolderStore(other.store_root)
    twin = make_release(other, others)
    assert twin.release_id == release.release_id

    with pytest.raises(BadInput, match="holds another artifact"):
        export_release(others, twin, registry, other)


class TestLogin:
    @pytest.fixture
    def locked(self, tmp_path: Path) -> Iterator[RunningRegistry]:
        """A registry that asks for a password."""
        (tmp_path / "htpasswd").write_text(f"ada:{BCRYPT_OF_SECRET}\n")
        auth = f"auth:\n  htpasswd:\n    realm: yard\n    path: {tmp_path / 'htpasswd'}\n"
        registry, process = start_registry(tmp_path, auth)
        yield registry
        stop(process)

    def test_of_the_settings_and_of_docker_are_used(
        self,
        locked: RunningRegistry,
        settings: Settings,
        store: FolderStore,
        release: Release,
        tmp_path: Path,
    ) -> None:
        registry = Registry.parse(f"oci://{locked.host}/models")
        with pytest.raises(BadInput, match="does not let us push") as refused:
            export_release(store, release, registry, settings)
        assert "docker login" in refused.value.hint
        wrong = Settings(home=settings.home, registry_username="ada", registry_password="wrong")
        with pytest.raises(BadInput, match="does not let us push"):
            export_release(store, release, registry, wrong)
        right = Settings(home=settings.home, registry_username="ada", registry_password="secret")
        assert not export_release(store, release, registry, right).reused

        (tmp_path / "docker").mkdir()
        login = {"auths": {locked.host: {"auth": "YWRhOnNlY3JldA=="}}}
        (tmp_path / "docker" / "config.json").write_text(json.dumps(login))
        assert export_release(store, release, registry, settings).reused


def test_a_registry_that_does_not_answer_is_worth_another_try(
    settings: Settings, store: FolderStore, release: Release
) -> None:
    with pytest.raises(Transient, match="cannot be reached"):
        export_release(store, release, Registry("127.0.0.1:9", "models"), settings)


def test_ecr_is_logged_in_to_with_credentials_of_aws(settings: Settings) -> None:
    from oras.auth import EcrAuth

    ecr = Registry.parse("oci://123456789012.dkr.ecr.eu-central-1.amazonaws.com/models")

    assert isinstance(_Remote(ecr, "tag", settings)._client.auth, EcrAuth)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({}, BadInput, "does not let us push"),
        ({"AWS_ACCESS_KEY_ID": "testing"}, BadInput, "does not let us push"),
        (
            {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
            Transient,
            "AWS gives no token",
        ),
    ],
    ids=["no credentials", "half of them", "AWS is out of reach"],
)
def test_a_login_to_ecr_that_fails_is_told_in_words(
    given: dict[str, str],
    kind: type[Exception],
    words: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    fixed = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in (fixed | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    ecr = Registry.parse("oci://123456789012.dkr.ecr.eu-central-1.amazonaws.com/models")
    challenge = requests.Response()
    challenge.headers["Www-Authenticate"] = (
        f'Bearer realm="https://{ecr.host}/",service="ecr.amazonaws.com"'
    )
    login = _Remote(ecr, "tag", settings)._client.auth.authenticate_request

    with pytest.raises(kind, match=words), _explained(ecr):
        login(challenge, {})


def test_a_refusal_by_aws_asks_for_a_login() -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": "AccessDeniedException", "Message": ""}}
    with pytest.raises(BadInput, match="does not let us push"), _explained(Registry("r.x", "m")):
        raise ClientError(answer, "GetAuthorizationToken")


def test_a_scratch_folder_that_cannot_be_made_is_named_and_not_the_registry(
    running: RunningRegistry, store: FolderStore, release: Release, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.write_text("in the way")

    with pytest.raises(BadInput, match=f"Cannot write {work}"):
        export_release(
            store, release, repository(running, tmp_path), Settings(home=tmp_path, work=work)
        )


@pytest.mark.parametrize(
    ("text", "host", "repository"),
    [
        ("oci://registry.example/models", "registry.example", "models"),
        ("oci://localhost:5000/team/models", "localhost:5000", "team/models"),
        ("oci://[::1]:5000/a-b/c_d", "[::1]:5000", "a-b/c_d"),
    ],
)
def test_a_repository_is_named_by_an_address(text: str, host: str, repository: str) -> None:
    assert Registry.parse(text) == Registry(host, repository)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "registry.example/models",
        "https://registry.example/models",
        "oci://registry.example",
        "oci://registry.example/",
        "oci://registry/models",
        "oci://registry.example/models:v1",
        "oci://registry.example/Models",
        "oci://registry.example/a/../b",
        "oci://ada:secret@registry.example/models",
    ],
)
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="names no repository"):
        Registry.parse(text)
