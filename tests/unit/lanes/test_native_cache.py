"""The native plugin's compile cache: what counts, what is dropped, what a start proves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests import fake_neuron
from tests.fake_neuron import NativeCache, Neff, graph_key, put

from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.errors import Refused
from trainyard.lanes import native_cache
from trainyard.lanes.expected import ANYTHING, Expected, expected_of
from trainyard.lanes.native_cache import capture, capture_expected, prove_start, snapshot
from trainyard.spec.model import Target
from trainyard.spec.neuron import NeuronSettings

TRN2 = Expected(platform_target="trn2", lnc=2, cores=8)
TARGET = Target(
    name="trn2",
    lane="neuron-native",
    instance="trn2.48xlarge",
    tensor_parallel_size=8,
    neuron=NeuronSettings(sdk="2.32.0"),
)


@pytest.fixture
def cache(tmp_path: Path) -> NativeCache:
    return NativeCache(tmp_path / "cache")


def captured(cache: NativeCache, expected: Expected = TRN2) -> tuple[list[str], list[str]]:
    files, dropped = capture_expected(cache.root, expected)
    return [path.as_posix() for path in files], list(dropped)


def dropped_reason(cache: NativeCache, key: str, expected: Expected = TRN2) -> str:
    """Return why an entry was dropped, beside another one that is whole."""
    cache.compile(number=99)
    files, dropped = captured(cache, expected)
    assert not [path for path in files if key in path]
    (line,) = dropped
    name, reason = line.split(": ", 1)
    assert name == f"neuron/compile_cache/{key}"
    return reason


class TestCapture:
    def test_a_whole_entry_is_taken_with_all_that_describes_it(self, cache: NativeCache) -> None:
        key = cache.compile()
        files, dropped = captured(cache)
        assert files == [
            f"neuron/compile_cache/{key}/{name}"
            for name in (
                ".artifact_metadata_v0.json",
                ".compilation_complete",
                "command.txt",
                "example_inputs.txt",
                "fxgraph.txt",
                "graph.hlo",
                f"graph_{key}.neff",
                "log-neuron-cc.txt",
            )
        ]
        assert dropped == []

    def test_locks_and_marks_of_access_stay_behind(self, cache: NativeCache) -> None:
        key = cache.compile()
        cache.hit(key)
        put(cache.entry(key) / "x.lock", b"")
        files, dropped = captured(cache)
        assert not [path for path in files if "lock" in path or "accessed" in path]
        assert not [path for path in files if "compilation_metadata" in path]
        assert dropped == []

    def test_everything_else_below_the_root_goes_along(self, cache: NativeCache) -> None:
        cache.compile()
        kernel = cache.kernel()
        put(cache.root / "torch_compile_cache" / "ab" / "trace", b"trace")
        put(cache.root / "modelinfos" / "llama.json", b"{}")
        files, dropped = captured(cache)
        others = [path for path in files if graph_key(0) not in path]
        assert others == [
            "modelinfos/llama.json",
            f"neuron/compile_cache/nki/{kernel.name}",
            "torch_compile_cache/ab/trace",
        ]
        assert dropped == []

    def test_a_half_written_kernel_is_dropped(self, cache: NativeCache) -> None:
        cache.compile()
        kernel = cache.kernel()
        kernel.write_bytes(kernel.read_bytes()[:-1])
        put(kernel.with_name(f"{kernel.name}.tmp.17"), b"{")
        files, dropped = captured(cache)
        assert not [path for path in files if "nki" in path]
        assert dropped == [
            f"neuron/compile_cache/nki/{kernel.name}.tmp.17: left by a write that was cut",
            f"neuron/compile_cache/nki/{kernel.name}: not a whole JSON document",
        ]

    def test_a_neff_outside_of_the_entries_is_judged_too(self, cache: NativeCache) -> None:
        cache.compile()
        put(cache.root / "neffs" / "good.neff", Neff().to_bytes())
        put(cache.root / "neffs" / "cut.neff", Neff().to_bytes()[:-1])
        put(cache.root / "neffs" / "other.neff", Neff(lnc_size=1).to_bytes())
        files, dropped = captured(cache)
        assert [path for path in files if "neffs" in path] == ["neffs/good.neff"]
        assert [line.split(":")[0] for line in dropped] == ["neffs/cut.neff", "neffs/other.neff"]

    def test_links_are_neither_followed_nor_taken(self, cache: NativeCache, tmp_path: Path) -> None:
        key = cache.compile()
        put(tmp_path / "secret" / "file", b"not ours")
        (cache.root / "outside").symlink_to(tmp_path / "secret")
        (cache.entry(key) / "notes.txt").symlink_to(tmp_path / "secret" / "file")
        (cache.folder / graph_key(7)).symlink_to(cache.entry(key))
        files, dropped = captured(cache)
        assert len(files) == 8
        assert dropped == [
            f"neuron/compile_cache/{key}/notes.txt: a symbolic link",
            f"neuron/compile_cache/{graph_key(7)}: a symbolic link",
            "outside: a symbolic link",
        ]

    @pytest.mark.parametrize(
        ("failed", "word"),
        [
            (0, r"compile_cache\.$"),
            (1, "One was dropped: neuron/"),
            (2, "2 were dropped, the first"),
        ],
    )
    def test_a_cache_without_a_whole_entry_is_refused(
        self, cache: NativeCache, failed: int, word: str
    ) -> None:
        cache.root.mkdir()
        for number in range(failed):
            cache.fail(number)
        with pytest.raises(Refused) as caught:
            capture(cache.root, None)
        assert re.search(word, caught.value.message)

    def test_a_compile_cache_behind_a_link_is_not_followed(
        self, cache: NativeCache, tmp_path: Path
    ) -> None:
        cache.compile()
        (cache.root / "neuron").rename(tmp_path / "elsewhere")
        (cache.root / "neuron").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Refused, match="dropped: neuron: a symbolic link"):
            capture(cache.root, None)


class TestDropped:
    def test_an_empty_entry(self, cache: NativeCache) -> None:
        cache.entry(graph_key(0)).mkdir(parents=True)
        assert dropped_reason(cache, graph_key(0)) == "empty"

    def test_a_failed_compile_is_named_with_the_compilers_code(self, cache: NativeCache) -> None:
        assert dropped_reason(cache, cache.fail()) == "the compiler failed (NCC_EVRF009)"

    def test_an_entry_that_somebody_compiles(self, cache: NativeCache) -> None:
        key = graph_key(0)
        for path, content in list(cache.writes(key))[:5]:
            put(path, content)
        assert dropped_reason(cache, key).startswith("locked: ")

    def test_an_entry_without_its_mark(self, cache: NativeCache) -> None:
        key = graph_key(0)
        put(cache.entry(key) / "graph.hlo", b"graph")
        assert dropped_reason(cache, key).startswith("half-written: ")

    @pytest.mark.parametrize("mark", ["", "completed:1700000000.2\n", "neff_size:", "complete"])
    def test_a_mark_that_is_cut_short(self, cache: NativeCache, mark: str) -> None:
        key = cache.compile()
        put(cache.entry(key) / ".compilation_complete", mark.encode())
        assert "cut short" in dropped_reason(cache, key)

    def test_a_neff_of_another_size_than_the_mark_says(self, cache: NativeCache) -> None:
        key = cache.compile()
        executable = cache.entry(key) / f"graph_{key}.neff"
        executable.write_bytes(executable.read_bytes()[:-1])
        assert "its mark says" in dropped_reason(cache, key)

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_mark_without_one_neff(self, cache: NativeCache, count: int) -> None:
        key = cache.compile()
        executable = cache.entry(key) / f"graph_{key}.neff"
        if count:
            put(cache.entry(key) / "second.neff", executable.read_bytes())
        else:
            executable.unlink()
        assert f"holds {count or 'no'} NEFFs" in dropped_reason(cache, key)

    def test_a_neff_with_one_flipped_byte(self, cache: NativeCache) -> None:
        key = cache.compile()
        executable = cache.entry(key) / f"graph_{key}.neff"
        content = bytearray(executable.read_bytes())
        content[-6] ^= 1
        executable.write_bytes(content)
        reason = dropped_reason(cache, key)
        assert f"graph_{key}.neff" in reason
        assert "damaged" in reason

    def test_an_entry_that_was_renamed(self, cache: NativeCache) -> None:
        key = cache.compile()
        cache.entry(key).rename(cache.entry(graph_key(1)))
        assert "moved or renamed" in dropped_reason(cache, graph_key(1))

    @pytest.mark.parametrize("text", [b"{", b"[]"])
    def test_a_broken_description(self, cache: NativeCache, text: bytes) -> None:
        key = cache.compile()
        put(cache.entry(key) / ".artifact_metadata_v0.json", text)
        assert "not a JSON object" in dropped_reason(cache, key)

    @pytest.mark.parametrize("suffix", [".tmp.71", ".trash.71", ".capture.71"])
    def test_leftovers_of_a_copy(self, cache: NativeCache, suffix: str) -> None:
        key = cache.compile()
        name = f"{key}{suffix}"
        cache.entry(key).rename(cache.entry(name))
        assert "was cut" in dropped_reason(cache, name)

    def test_code_for_another_chip(self, cache: NativeCache) -> None:
        key = replace(cache, target="trn3").compile()
        assert dropped_reason(cache, key) == "compiled for trn3, the target is trn2"

    def test_code_for_another_lnc_and_too_many_cores(self, cache: NativeCache) -> None:
        key = replace(cache, neff=Neff(lnc_size=1, num_tpb=64)).compile()
        reason = dropped_reason(cache, key)
        assert "lnc_size" in reason
        assert "needs 64 cores" in reason
        assert not reason.endswith(".")

    def test_without_a_target_nothing_is_compared(self, cache: NativeCache) -> None:
        replace(cache, target="trn3", neff=Neff(lnc_size=1, num_tpb=64)).compile()
        assert len(captured(cache, ANYTHING)[0]) == 8

    def test_the_target_of_a_spec_is_compared(self, cache: NativeCache) -> None:
        cache.compile(0)
        replace(cache, neff=Neff(lnc_size=1)).compile(1)
        files, dropped = capture(cache.root, TARGET)
        assert len(files) == 8
        assert len(dropped) == 1
        one = TARGET.model_copy(update={"instance": "trn1.32xlarge"})
        assert expected_of(one).lnc == 1
        with pytest.raises(Refused, match="2 were dropped, the first: neuron"):
            capture(cache.root, one)


def test_a_compile_that_is_cut_anywhere_leaves_nothing_that_counts(cache: NativeCache) -> None:
    whole = cache.compile(1)
    writes = list(cache.writes(graph_key(0)))
    for end in range(len(writes)):
        *before, (path, content) = writes[: end + 1]
        for written, text in before:
            put(written, text)
        put(path, content[: len(content) // 2])
        files, dropped = captured(cache)
        assert {path.split("/")[2] for path in files} == {whole}
        if cache.entry(graph_key(0)).exists():
            assert dropped[0].startswith(f"neuron/compile_cache/{graph_key(0)}: ")


def test_a_compiler_that_is_killed_leaves_whole_entries_and_named_ones(tmp_path: Path) -> None:
    program = [sys.executable, fake_neuron.__file__, str(tmp_path), "--graphs", "9"]
    compiler = subprocess.Popen([*program, "--pause", "0.005"], stdout=subprocess.PIPE, text=True)
    assert compiler.stdout is not None
    with compiler, compiler.stdout:
        for _ in range(3):
            assert "cache miss" in compiler.stdout.readline()
        compiler.send_signal(signal.SIGKILL)
    files, dropped = capture(tmp_path, TARGET)
    entries = {path.parts[2] for path in files}
    assert {graph_key(0), graph_key(1)} <= entries
    begun = {path.name for path in (tmp_path / native_cache.COMPILE_CACHE).iterdir()}
    cut = {name for name in begun if not name.startswith(".")} - entries
    assert [line.split(":")[0].split("/")[-1] for line in dropped] == sorted(cut)


def bundle(cache: NativeCache) -> BundleManifest:
    files = tuple(
        FileEntry(path=path.as_posix(), size=1, sha256="0" * 64)
        for path in capture_expected(cache.root, TRN2)[0]
    )
    return BundleManifest(
        compile_key="k",
        lane="neuron-native",
        key_inputs={},
        files=files,
        digest=files_digest(files),
        toolchain={},
        compile_s=900.0,
    )


class TestStart:
    @pytest.fixture
    def key(self, cache: NativeCache) -> str:
        return cache.compile()

    def log(self, *keys: str, text: str = "") -> str:
        hits = "".join(fake_neuron.HIT.format(key=key) for key in keys)
        return f"{hits}{text}{fake_neuron.READY}"

    def test_a_start_that_hits_every_graph_used_its_bundle(
        self, cache: NativeCache, key: str
    ) -> None:
        made, before = bundle(cache), snapshot(cache.root)
        cache.hit(key)
        put(cache.folder / f".{key}.compilation_metadata.lock", b"")
        after = snapshot(cache.root)
        proof = prove_start(log=self.log(key), before=before, after=after, bundle=made)
        assert proof.used_bundle
        assert proof.engine_init_s == 41.5
        assert "1 of the bundle's 1 graphs were found" in proof.reason
        assert proof.new_files == ()

    def test_a_start_that_compiles_did_not(self, cache: NativeCache, key: str) -> None:
        made, before = bundle(cache), snapshot(cache.root)
        other = cache.compile(1)
        after = snapshot(cache.root)
        proof = prove_start(log=self.log(key), before=before, after=after, bundle=made)
        assert not proof.used_bundle
        assert proof.new_files == (
            f"neuron/compile_cache/{other}/.compilation_complete",
            f"neuron/compile_cache/{other}/graph_{other}.neff",
        )

    def test_writing_an_entry_again_counts_as_compiling(self, cache: NativeCache, key: str) -> None:
        made, before = bundle(cache), snapshot(cache.root)
        executable = cache.entry(key) / f"graph_{key}.neff"
        os.utime(executable, ns=(0, executable.stat().st_mtime_ns + 1))
        after = snapshot(cache.root)
        proof = prove_start(log=self.log(key), before=before, after=after, bundle=made)
        assert not proof.used_bundle
        assert "such as" in proof.reason

    @pytest.mark.parametrize("line", [fake_neuron.FATAL_MISS, fake_neuron.MISS])
    def test_a_miss_in_the_log_is_told_with_its_graph(
        self, cache: NativeCache, key: str, line: str
    ) -> None:
        made, seen = bundle(cache), snapshot(cache.root)
        log = self.log(key, text=line.format(key=graph_key(5)))
        proof = prove_start(log=log, before=seen, after=seen, bundle=made)
        assert not proof.used_bundle
        assert graph_key(5) in proof.reason

    def test_a_graph_from_elsewhere_is_no_proof(self, cache: NativeCache, key: str) -> None:
        made, seen = bundle(cache), snapshot(cache.root)
        log = self.log(key, graph_key(5))
        proof = prove_start(log=log, before=seen, after=seen, bundle=made)
        assert not proof.used_bundle
        assert "not in the bundle" in proof.reason

    def test_a_bundle_that_was_not_restored_proves_nothing(
        self, cache: NativeCache, key: str
    ) -> None:
        made = bundle(cache)
        (cache.entry(key) / ".compilation_complete").unlink()
        seen = snapshot(cache.root)
        proof = prove_start(log=self.log(key), before=seen, after=seen, bundle=made)
        assert not proof.used_bundle
        assert ".compilation_complete" in proof.reason

    def test_without_a_bundle_or_a_word_in_the_log_nothing_is_proven(
        self, cache: NativeCache, key: str
    ) -> None:
        made, seen = bundle(cache), snapshot(cache.root)
        assert not prove_start(log=self.log(key), before=seen, after=seen, bundle=None).used_bundle
        assert not prove_start(log="", before=seen, after=seen, bundle=made).used_bundle
        empty = made.model_copy(update={"files": ()})
        assert not prove_start(log="", before=seen, after=seen, bundle=empty).used_bundle
        silent = fake_neuron.PLATFORM + fake_neuron.READY
        assert prove_start(log=silent, before=seen, after=seen, bundle=made).used_bundle, (
            "no line for a hit, but nothing was compiled either"
        )

    def test_a_server_that_came_up_without_the_plugin_proves_nothing(
        self, cache: NativeCache, key: str
    ) -> None:
        made, seen = bundle(cache), snapshot(cache.root)
        proof = prove_start(log=fake_neuron.READY, before=seen, after=seen, bundle=made)
        assert not proof.used_bundle
        assert "may not run on a Neuron device" in proof.reason
