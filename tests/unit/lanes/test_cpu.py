from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.canonical import digest
from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput, Refused
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.registry import get_lane
from trainyard.spec.model import Target
from trainyard.spec.rules import LANE_PARTS

LANE = CpuLane()
TARGET = Target(name="cpu", lane="cpu", max_model_len=256, max_num_batched_tokens=256)
TOOLCHAIN = {"vllm": "0.32.0", "torch": "2.13.0+cpu", "c++": "12.2.0", "processor": "avx2 fma"}
INIT = (
    "(EngineCore pid=7) INFO 11-22 12:46:48 [core.py:402] "
    "init engine (profile, create kv cache, warmup model) took 28.10 s\n"
)


def key(target: Target, **changes: str) -> str:
    inputs = LANE.key_inputs(
        target, architecture_digest="architecture", toolchain={**TOOLCHAIN, **changes}
    )
    return digest(inputs)


@given(
    st.fixed_dictionaries(
        {
            "max_model_len": st.integers(16, 8192),
            "max_num_batched_tokens": st.integers(16, 8192),
            "max_num_seqs": st.integers(1, 256),
            "block_size": st.sampled_from([None, 32, 64, 128]),
            "kv_cache_gib": st.floats(0.1, 64),
            "enable_prefix_caching": st.booleans(),
            "required": st.booleans(),
            "name": st.sampled_from(["cpu", "cpu-2"]),
        }
    )
)
def test_settings_that_leave_the_code_alone_leave_the_key_alone(changes: dict[str, Any]) -> None:
    assert key(TARGET.model_copy(update=changes)) == key(TARGET)


def test_what_changes_the_code_changes_the_key() -> None:
    keys = {
        key(TARGET),
        key(TARGET.model_copy(update={"dtype": "float32"})),
        key(TARGET.model_copy(update={"tensor_parallel_size": 2})),
        *(key(TARGET, **{name: "another"}) for name in TOOLCHAIN),
        digest(LANE.key_inputs(TARGET, architecture_digest="another", toolchain=TOOLCHAIN)),
    }
    assert len(keys) == 4 + len(TOOLCHAIN)


def test_every_field_of_a_target_is_in_the_key_or_in_the_serving_settings() -> None:
    inputs = LANE.key_inputs(TARGET, architecture_digest="a", toolchain=TOOLCHAIN)
    serving = LANE.serving_settings(TARGET, served_model_name="adder")
    of_the_plan = {"name", "instance", "required"} | LANE_PARTS.keys()
    assert set(Target.model_fields) - of_the_plan <= inputs.keys() | serving.keys()
    assert not inputs.keys() & serving.keys()
    assert serving["served_model_name"] == "adder"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"instance": "trn2.48xlarge"}, "trn2.48xlarge"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 1"),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 17}, "max_num_batched_tokens"),
        ({"block_size": 48}, "multiple of 32"),
    ],
)
def test_broken_rules_are_named_with_the_remedy(changes: dict[str, Any], word: str) -> None:
    (problem,) = LANE.problems(TARGET.model_copy(update=changes))
    assert word in problem


def test_a_plain_target_breaks_no_rule() -> None:
    assert LANE.problems(TARGET) == ()


def test_the_command_keeps_to_loopback_and_to_its_caches(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/env")
    target = TARGET.model_copy(
        update={"block_size": 64, "kv_cache_gib": 0.5, "enable_prefix_caching": False}
    )
    command = LANE.command(
        target,
        python=python,
        model_dir=tmp_path / "model",
        cache_dir=tmp_path / "cache",
        served_model_name="adder",
        port=8123,
        cache_only=True,
    )
    assert command.argv[0] == str(python), "the link itself: it is what makes the environment"
    for argument in (
        "--host=127.0.0.1",
        "--port=8123",
        f"--model={tmp_path / 'model'}",
        "--served-model-name=adder",
        "--dtype=bfloat16",
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--block-size=64",
        "--kv-cache-memory-bytes=536870912",
        "--no-enable-prefix-caching",
    ):
        assert argument in command.argv
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(command.env[name]).is_relative_to(tmp_path / "cache")
    assert command.env["HF_HUB_OFFLINE"] == "1"


def cache(folder: Path) -> Path:
    """Make a folder that looks like the caches after a compile."""
    inductor = folder / "inductor"
    for name, content in {
        "ab/cab.cpp": b"int x;",
        "ab/cab.so": b"\x7fELF code",
        "ab/cab.main.cpp": b"int main;",
        "ab/cab.main.so": b"\x7fELF code",
        "de/cde.py": b"call = None",
        "fxgraph/4e/f4e/pabc": b"graph",
        "aotautograd/acg/asq": b"graph",
        "locks/cab.lock": b"",
    }.items():
        path = inductor / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    infos = folder / "vllm" / "modelinfos"
    infos.mkdir(parents=True)
    (infos / "llama.json").write_text("{}")
    (infos / "llama.json.tmp").write_text("{")
    return folder


def test_capture_takes_what_is_whole(tmp_path: Path) -> None:
    files, dropped = LANE.capture(cache(tmp_path))
    assert [path.as_posix() for path in files] == [
        "inductor/ab/cab.cpp",
        "inductor/ab/cab.main.cpp",
        "inductor/ab/cab.main.so",
        "inductor/ab/cab.so",
        "inductor/aotautograd/acg/asq",
        "inductor/de/cde.py",
        "inductor/fxgraph/4e/f4e/pabc",
        "vllm/modelinfos/llama.json",
    ]
    assert dropped == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("inductor/xy/.123.tmp", b"half", "temporary"),
        ("inductor/xy/cxy.tmp", b"half", "temporary"),
        ("inductor/xy/cxy.so", b"", "empty"),
        ("inductor/xy/cxy.so", b"#!/bin/sh", "shared object"),
        ("inductor/xy/cxy.cpp", b"int y;", "without its compiled code"),
    ],
)
def test_capture_drops_what_is_not_and_says_why(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = cache(tmp_path) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    files, dropped = LANE.capture(tmp_path)
    assert Path(name) not in files
    (line,) = dropped
    assert line.startswith(f"{name}: ")
    assert reason in line


def test_capture_leaves_links_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not ours")
    folder = cache(tmp_path / "cache")
    (folder / "inductor" / "link.py").symlink_to(secret)
    files, _ = LANE.capture(folder)
    assert Path("inductor/link.py") not in files


@pytest.mark.parametrize("missing", ["inductor/fxgraph/4e/f4e/pabc", "inductor/ab"])
def test_capture_refuses_caches_without_a_result(tmp_path: Path, missing: str) -> None:
    path = cache(tmp_path) / missing
    for each in [path] if path.is_file() else list(path.iterdir()):
        each.unlink()
    with pytest.raises(Refused, match="no complete result"):
        LANE.capture(tmp_path)


def manifest(folder: Path) -> BundleManifest:
    files = tuple(
        FileEntry(path=path.as_posix(), size=1, sha256="0" * 64) for path in LANE.capture(folder)[0]
    )
    return BundleManifest(
        compile_key="k",
        lane="cpu",
        key_inputs={},
        files=files,
        digest=files_digest(files),
        toolchain={},
        compile_s=70.0,
        engine_init_s=28.1,
    )


def test_a_start_that_writes_nothing_used_its_bundle(tmp_path: Path) -> None:
    bundle = manifest(cache(tmp_path))
    before = LANE.snapshot(tmp_path)
    # Locks are taken on a hit, too.
    (tmp_path / "inductor" / "locks" / "new.lock").touch()
    proof = LANE.prove_start(
        log=INIT.replace("28.10", "4.52"),
        before=before,
        after=LANE.snapshot(tmp_path),
        bundle=bundle,
    )
    assert proof.used_bundle
    assert proof.engine_init_s == 4.52
    assert "4.5 s" in proof.reason
    assert "28.1 s" in proof.reason


def test_a_start_that_writes_did_not_use_its_bundle(tmp_path: Path) -> None:
    bundle = manifest(cache(tmp_path))
    before = LANE.snapshot(tmp_path)
    (tmp_path / "inductor" / "ab" / "cnew.so").write_bytes(b"\x7fELF new")
    proof = LANE.prove_start(log=INIT, before=before, after=LANE.snapshot(tmp_path), bundle=bundle)
    assert not proof.used_bundle
    assert proof.new_files == ("inductor/ab/cnew.so",)


def test_writing_a_file_again_counts_as_compiling(tmp_path: Path) -> None:
    bundle = manifest(cache(tmp_path))
    before = LANE.snapshot(tmp_path)
    graph = tmp_path / "inductor" / "fxgraph" / "4e" / "f4e" / "pabc"
    os.utime(graph, ns=(0, graph.stat().st_mtime_ns + 1))
    proof = LANE.prove_start(log=INIT, before=before, after=LANE.snapshot(tmp_path), bundle=bundle)
    assert proof.new_files == ("inductor/fxgraph/4e/f4e/pabc",)
    assert not proof.used_bundle


def test_a_bundle_that_was_not_restored_proves_nothing(tmp_path: Path) -> None:
    bundle = manifest(cache(tmp_path))
    (tmp_path / "inductor" / "de" / "cde.py").unlink()
    seen = LANE.snapshot(tmp_path)
    proof = LANE.prove_start(log=INIT, before=seen, after=seen, bundle=bundle)
    assert not proof.used_bundle
    assert "inductor/de/cde.py" in proof.reason


def test_without_bundle_or_log_line_nothing_is_proven(tmp_path: Path) -> None:
    bundle = manifest(cache(tmp_path))
    seen = LANE.snapshot(tmp_path)
    silent = LANE.prove_start(log="ready", before=seen, after=seen, bundle=bundle)
    assert not silent.used_bundle
    assert silent.engine_init_s is None
    assert not LANE.prove_start(log=INIT, before=seen, after=seen, bundle=None).used_bundle


def test_the_log_tells_how_far_a_start_is() -> None:
    log = ""
    stages = [LANE.stage(log)]
    for line in (
        "non-default args: {}",
        "Resolved architecture: LlamaForCausalLM",
        "Starting to load model /x...",
        "Warming up model for the compilation...",
        "Warming up done.",
        INIT,
        "INFO:     Application startup complete.",
    ):
        log += line + "\n"
        stages.append(LANE.stage(log))
    assert len(set(stages)) == len(stages)
    assert stages[-1] == "ready"


def test_lanes_are_found_by_name() -> None:
    assert get_lane("cpu").name == "cpu"
    with pytest.raises(BadInput, match="no lane 'gpu'"):
        get_lane("gpu")
