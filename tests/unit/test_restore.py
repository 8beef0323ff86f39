from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.unit.lanes.neuron_targets import NXDI
from tests.unit.store.flaky import DownStore
from tests.unit.test_materialize import BUNDLE, CONTENT, PYTHONPATH, found, put_files
from tests.unit.yard import spec

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.channel import Channel, Track
from trainyard.documents.release import Release
from trainyard.errors import BadInput, CorruptFile, NotFound, Refused, StorageFull, Transient
from trainyard.materialize import Means
from trainyard.node_cache.cache import GIB
from trainyard.releases import release_id_of, store_release
from trainyard.restore import Restored, evict_from_cache, open_cache, restore_release
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.spec.model import Target
from trainyard.store.documents import create_document
from trainyard.store.fetch import FetchPolicy
from trainyard.store.layout import (
    bundle_manifest_key,
    channel_key,
    checkpoint_manifest_key,
    release_key,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUICK = Means(policy=FetchPolicy(first_pause_s=0.001))


class Watched:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.size = 0
        self.done = 0

    def total(self, size: int) -> None:
        self.size = size

    def moved(self, size: int) -> None:
        self.done += size


class World:
    """A store with signed releases, and a machine with a node cache."""

    def __init__(self, root: Path, *, cache: bool = True, limit_bytes: int = 0) -> None:
        self.root = root
        self.settings = Settings(
            home=root / "home",
            store=str(root / "store"),
            node_cache=root / "cache" if cache else None,
            node_cache_gib=limit_bytes / GIB,
        )
        self.store = DownStore(root / "store")

    def publish(self, revision: str, content: dict[str, bytes] = CONTENT) -> Release:
        model = put_files(self.store, content, f"checkpoints/adder/{revision}")
        bundle = put_files(self.store, BUNDLE, "bundles/key")
        checkpoint = CheckpointManifest(
            model="adder",
            revision=revision,
            source="models",
            files=model,
            digest=files_digest(model),
            architecture_digest="0",
            parameters=1,
        )
        create_document(self.store, checkpoint_manifest_key("adder", revision), checkpoint)
        compiled = BundleManifest(
            compile_key="key",
            lane="cpu",
            key_inputs={},
            files=bundle,
            digest=files_digest(bundle),
            toolchain={},
            compile_s=1.0,
            created_at=NOW,
        )
        create_document(self.store, bundle_manifest_key("key"), compiled)
        model_spec = spec()
        release = Release(
            created_at=NOW,
            release_id=release_id_of(
                "adder",
                checkpoint_digest=checkpoint.digest,
                compile_key="key",
                serving_digest="0",
            ),
            model="adder",
            target=model_spec.targets[0],
            lane="cpu",
            checkpoint_key=checkpoint_manifest_key("adder", revision),
            checkpoint_digest=checkpoint.digest,
            revision=revision,
            compile_key="key",
            bundle_digest=compiled.digest,
            serving={},
            serving_digest="0",
            served_model_name="adder",
            toolchain={},
            measurement_id="m",
            spec=model_spec,
        )
        return store_release(self.store, release, signing_key(self.settings))[0]

    def restore(self, release: Release, name: str = "one", **options: object) -> Restored:
        return restore_release(
            self.store,
            release.release_id,
            self.root / "pods" / name,
            self.settings,
            means=QUICK,
            **options,  # type: ignore[arg-type]
        )

    def stable(self, release: Release, environment: str = "production") -> None:
        channel = Channel(
            model="adder",
            environment=environment,
            stable=Track(release_id=release.release_id, since=NOW),
        )
        self.store.put(channel_key("adder", environment), channel.to_bytes())

    def leave(self, name: str = "one") -> None:
        shutil.rmtree(self.root / "pods" / name)

    @property
    def owners(self) -> list[str]:
        return [pin.owner for pin in open_cache(self.settings).state().pins]


def check(restored: Restored, content: dict[str, bytes] = CONTENT) -> None:
    assert found(restored.where.model_dir) == content
    assert found(restored.where.cache_dir) == BUNDLE


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class TestRestore:
    def test_a_release_lies_where_a_server_wants_it(self, world: World) -> None:
        watched = Watched()
        restored = world.restore(world.publish("v1"), watcher=watched)
        check(restored)
        assert restored.where.model_dir == world.root / "pods" / "one" / "model"
        size = sum(map(len, [*CONTENT.values(), *BUNDLE.values()]))
        assert watched.size == watched.done == restored.size_bytes == size
        assert restored.store_problem == ""

    def test_without_a_cache_too(self, tmp_path: Path) -> None:
        world = World(tmp_path, cache=False)
        release = world.publish("v1")
        check(world.restore(release))
        with pytest.raises(BadInput, match="TRAINYARD_NODE_CACHE is not set"):
            world.restore(release, pin_owner="me")

    def test_two_pods_need_one_transfer_and_one_copy(self, world: World) -> None:
        release = world.publish("v1")
        first = world.restore(release, "one")
        world.store.asked.clear()
        second = world.restore(release, "two")
        check(second)
        assert world.store.asked == []
        name = "model.safetensors"
        assert (first.where.model_dir / name).samefile(second.where.model_dir / name)
        code = "inductor/code.so"
        assert not (first.where.cache_dir / code).samefile(second.where.cache_dir / code)

    def test_revisions_share_the_files_they_have_in_common(self, world: World) -> None:
        world.restore(world.publish("v1"))
        world.store.asked.clear()
        other = {**CONTENT, "model.safetensors": b"y" * 5000}
        check(world.restore(world.publish("v2", other), "two"), other)
        assert world.store.opened == ["checkpoints/adder/v2/model.safetensors"]

    def test_where_links_are_impossible_files_are_copied(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = world.publish("v1")

        def fail(*_: object, **__: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "hardlink_to", fail)
            check(world.restore(release))
            check(world.restore(release, "two"))

    def test_an_unsigned_release_is_refused(self, world: World, tmp_path: Path) -> None:
        release = world.publish("v1")
        stranger = Settings(home=tmp_path / "other", node_cache=tmp_path / "cache")
        with pytest.raises(BadInput, match="is not trusted here"):
            restore_release(world.store, release.release_id, tmp_path / "pod", stranger)
        assert not (tmp_path / "pod").exists()

    def test_a_release_that_does_not_exist(self, world: World) -> None:
        with pytest.raises(NotFound):
            restore_release(world.store, "adder-0123456789ab", world.root / "pod", world.settings)
        with pytest.raises(BadInput, match="not a release id"):
            restore_release(world.store, "../x", world.root / "pod", world.settings)


class TestDamage:
    def damage(self, path: Path) -> None:
        before = path.stat()
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def cached(self, world: World, name: str) -> Path:
        entry = next(
            each
            for each in put_files(world.store, CONTENT, "checkpoints/adder/v1")
            if each.path == name
        )
        return open_cache(world.settings).path(entry.sha256)

    def test_a_flipped_byte_in_the_cache_is_found_named_and_mended(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = world.publish("v1")
        world.restore(release)
        self.damage(self.cached(world, "model.safetensors"))
        check(world.restore(release, "two"))
        assert "checkpoints/adder/v1/model.safetensors" in caplog.text
        assert "is damaged; it is brought again" in caplog.text

    def test_with_the_store_down_it_is_not_served(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = world.publish("v1")
        world.restore(release)
        self.damage(self.cached(world, "model.safetensors"))
        world.store.down = True
        with pytest.raises(Transient):
            world.restore(release, "two")
        assert "checkpoints/adder/v1/model.safetensors" in caplog.text
        assert not (world.root / "pods" / "two" / "model.restored.json").exists()

    def test_a_flipped_byte_in_the_store_is_found_and_named(self, world: World) -> None:
        release = world.publish("v1")
        self.damage(world.store.root / "checkpoints" / "adder" / "v1" / "model.safetensors")
        with pytest.raises(CorruptFile, match=r"checkpoints/adder/v1/model\.safetensors in file:"):
            world.restore(release)

    @pytest.mark.parametrize("what", ["checkpoint", "bundle", "release"])
    def test_a_changed_copy_of_a_document_is_refused_or_mended(
        self, world: World, what: str
    ) -> None:
        release = world.publish("v1")
        world.restore(release)
        key = {
            "checkpoint": checkpoint_manifest_key("adder", "v1"),
            "bundle": bundle_manifest_key("key"),
            "release": release_key("adder", release.release_id),
        }[what]
        copy = open_cache(world.settings).documents / key
        # What a release states is in base64: `eyJ` is how a JSON object begins.
        old = {"checkpoint": "config.json", "bundle": "code.so", "release": '"payload": "eyJ'}
        new = {"checkpoint": "evil.json", "bundle": "evil.so", "release": '"payload": "eyK'}
        text = copy.read_text()
        assert old[what] in text
        copy.write_text(text.replace(old[what], new[what]))
        world.store.down = True
        with pytest.raises(
            BadInput, match=r"contradicts itself|does not match its (signature|checksum)"
        ):
            world.restore(release, "two")
        world.store.down = False
        check(world.restore(release, "two"))
        world.store.down = True
        check(world.restore(release, "three"))


class TestOtherCode:
    def test_a_bundle_that_its_server_would_load_in_silence_is_refused(self, world: World) -> None:
        made = world.publish("r1")
        target = Target.model_validate({**NXDI, "nxdi": None})
        world.store.delete(release_key("adder", made.release_id))
        other = made.model_copy(update={"lane": target.lane, "target": target})
        store_release(world.store, other, signing_key(world.settings))
        with pytest.raises(Refused, match=r"There is no model\.pt with its neuron_config"):
            world.restore(made)


class TestStoreDown:
    def test_a_release_that_was_here_is_restored_from_the_cache_alone(self, world: World) -> None:
        release = world.publish("v1")
        world.restore(release, pin_owner="stable")
        world.leave()
        world.store.down = True
        world.store.asked.clear()
        check(world.restore(release, "two"))
        assert world.store.asked == []

    def test_the_same_folder_is_used_again(self, world: World) -> None:
        release = world.publish("v1")
        world.restore(release)
        world.store.down = True
        check(world.restore(release))

    def test_without_a_copy_of_a_document_the_store_is_needed(self, world: World) -> None:
        release = world.publish("v1")
        world.restore(release)
        (open_cache(world.settings).documents / bundle_manifest_key("key")).unlink()
        world.store.down = True
        with pytest.raises(Transient, match="Connection refused"):
            world.restore(release, "two")
        world.store.down = False
        check(world.restore(release, "two"))

    def test_one_that_was_not_says_what_is_wrong_with_the_store(self, world: World) -> None:
        release = world.publish("v1")
        world.store.down = True
        with pytest.raises(Transient, match="Connection refused"):
            world.restore(release)

    def test_what_is_missing_can_still_not_be_brought(self, world: World) -> None:
        release = world.publish("v1")
        world.restore(release)
        world.leave()
        evict_from_cache(world.store, world.settings, 0)
        world.store.down = True
        with pytest.raises(Transient, match="Connection refused"):
            world.restore(release)


class TestPins:
    def test_what_a_channel_serves_is_pinned_until_it_serves_something_else(
        self, world: World
    ) -> None:
        first = world.publish("v1")
        second = world.publish("v2", {**CONTENT, "model.safetensors": b"y" * 5000})
        world.stable(first)
        world.restore(first)
        assert world.owners == ["channel adder/production"]
        world.leave()
        assert evict_from_cache(world.store, world.settings, 0).over_bytes
        world.restore(second, "two")
        world.stable(second)
        evict_from_cache(world.store, world.settings, 0)
        state = open_cache(world.settings).state()
        assert [pin.release_id for pin in state.pins] == [second.release_id]
        assert [each.release_id for each in state.releases if each.files] != []

    def test_with_the_store_down_pins_stay(self, world: World) -> None:
        release = world.publish("v1")
        world.stable(release)
        world.restore(release)
        world.leave()
        world.store.down = True
        evict_from_cache(world.store, world.settings, 0)
        assert world.owners == ["channel adder/production"]
        check(world.restore(release))

    def test_a_cache_that_must_grow_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        world = World(tmp_path, limit_bytes=6000)
        first = world.publish("v1")
        world.restore(first, pin_owner="me")
        second = world.publish("v2", {**CONTENT, "model.safetensors": b"y" * 5000})
        restored = world.restore(second, "two")
        check(restored, {**CONTENT, "model.safetensors": b"y" * 5000})
        assert restored.over_limit_bytes > 3900
        assert "beyond its limit" in caplog.text


def test_a_full_disk_leaves_nothing_half_visible(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = world.publish("v1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageFull, match="No space left"):
            world.restore(release)
    assert not (world.root / "pods" / "one" / "model.restored.json").exists()
    assert open_cache(world.settings).state().sizes.keys() <= {
        each.sha256 for each in put_files(world.store, {"a/b/c": b""}, "checkpoints/adder/v1")
    }
    check(world.restore(release))


# --- Processes --------------------------------------------------------------------------------

BIG = {f"part-{number}": random.Random(number).randbytes(400_000) for number in range(12)}


def environment(world: World) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": PYTHONPATH,
        "TRAINYARD_HOME": str(world.settings.home),
        "TRAINYARD_STORE": str(world.store.root),
        "TRAINYARD_NODE_CACHE": str(world.settings.node_cache),
    }


def command(world: World, release: Release, name: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "trainyard",
            "materialize",
            release.release_id,
            str(world.root / "pods" / name),
            *options,
        ],
        env=environment(world),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_pods_start_at_once(world: World) -> None:
    release = world.publish("v1", BIG)
    processes = [command(world, release, str(number), "--json") for number in range(4)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    for number, output in enumerate(outputs):
        result = json.loads(output.splitlines()[-1])
        assert result["release_id"] == release.release_id
        assert result["model_dir"] == str(world.root / "pods" / str(number) / "model")
        assert found(Path(result["model_dir"])) == BIG
    cache = open_cache(world.settings)
    assert cache.state().partial_bytes == 0
    assert list((cache.root / "sessions").iterdir()) == []


def kill_and_restore(world: World, release: Release, delay_s: float) -> None:
    process = command(world, release, "one")
    try:
        time.sleep(delay_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    pod = world.root / "pods" / "one"
    if (pod / "model.restored.json").exists():
        assert found(pod / "model") == BIG
    cache = open_cache(world.settings)
    if cache.root.exists():
        for entry in put_files(world.store, BIG, "checkpoints/adder/v1"):
            path = cache.path(entry.sha256)
            assert not path.exists() or path.read_bytes() == BIG[entry.path]


def test_a_restore_that_is_killed_leaves_nothing_wrong(world: World) -> None:
    release = world.publish("v1", BIG)
    started = time.monotonic()
    assert command(world, release, "whole").communicate(timeout=600)[0]
    whole_s = time.monotonic() - started
    shutil.rmtree(world.root / "cache")
    for share in (0.6, 0.75, 0.9):
        kill_and_restore(world, release, share * whole_s)
    check(world.restore(release), BIG)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_restore_that_is_killed_at_whatever_moment_leaves_nothing_wrong(world: World) -> None:
    release = world.publish("v1", BIG)
    started = time.monotonic()
    assert command(world, release, "whole").communicate(timeout=600)[0]
    whole_s = time.monotonic() - started
    moments = random.Random(1)
    for number in range(200):
        if number % 5 == 0:
            shutil.rmtree(world.root / "cache", ignore_errors=True)
            shutil.rmtree(world.root / "pods", ignore_errors=True)
        kill_and_restore(world, release, moments.uniform(0.4, 1.1) * whole_s)
        if number % 5 == 4:
            check(world.restore(release), BIG)
