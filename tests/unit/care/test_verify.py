"""Verification names whatever is missing, wrong or too much, down to one flipped byte."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.care.world import POLICY, keys, store_bundle, store_files
from tests.unit.yard import Yard

from trainyard.care.verify import Problem, Verifier
from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.harness import HarnessReport
from trainyard.documents.logits import LogitFigures, LogitReport, logits_digest
from trainyard.errors import NotFound
from trainyard.releases import list_releases
from trainyard.settings import Settings
from trainyard.spec.model import LogitValidation
from trainyard.store.documents import create_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key, logits_key, release_key, tasks_key

HASHED = ("checkpoints", "bundles", "evals")
POSITIONS = 4
"""Bytes that are flipped in each key, the first and the last among them."""


def verify(yard: Yard, *prefixes: str) -> list[Problem]:
    return list(Verifier(yard.store, yard.settings, POLICY).run(prefixes).problems)


def flip(path: Path, position: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.chmod(0o644)
    path.write_bytes(data)


def first(yard: Yard, start: str, end: str = "") -> str:
    return min(key for key in keys(yard.store, start) if key.endswith(end))


def test_a_whole_store_has_no_problems(yard: Yard) -> None:
    verified = Verifier(yard.store, yard.settings, POLICY).run()

    assert verified.problems == ()
    assert verified.is_whole
    entries = list(yard.store.list(""))
    assert (verified.files, verified.size) == (len(entries), sum(each.size for each in entries))


def test_each_flipped_byte_is_found_and_named(yard: Yard) -> None:
    """In every file, manifest, document and signature, at the ends and anywhere between."""
    dice = random.Random(5)
    derived = ("reports/", "expectations.json")
    missed = []
    for entry in yard.store.list(""):
        if any(word in entry.key for word in derived):
            continue
        path = yard.store.local_path(entry.key)
        whole = path.read_bytes()
        mode = path.stat().st_mode
        # The last byte of a document is the end of its last line, which says nothing.
        last = entry.size - (1 if entry.key.startswith(HASHED) else 2)
        positions = {0, last, *(dice.randrange(last + 1) for _ in range(POSITIONS - 2))}
        for position in sorted(positions):
            flip(path, position, 1 << dice.randrange(8))
            found = verify(yard, entry.key)
            if not any(each.is_wrong and _names(each, entry.key) for each in found):
                missed.append((entry.key, position, path.read_bytes()[position : position + 9]))
            path.write_bytes(whole)
        os.chmod(path, mode)
    assert missed == []
    assert verify(yard) == []


def _names(problem: Problem, key: str) -> bool:
    """Is `key` the problem, or named in it? Files of evaluation sets have one digest together."""
    return problem.key == key or Path(key).name in problem.message or key in problem.message


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("checkpoints/adder/v1", "safetensors"),
        ("checkpoints/adder/v1", "manifest.json"),
        ("bundles", "graph.bin"),
        ("bundles", "manifest.json"),
        ("measurements", "v1.json"),
        ("samples/m-v1", ".json"),
        ("verdicts/adder-v1", "accuracy.json"),
        ("plans", "v1.json"),
    ],
)
def test_what_somebody_names_and_is_gone_is_missing(yard: Yard, start: str, end: str) -> None:
    key = first(yard, start, end)
    yard.store.delete(key)

    assert (key, "missing") in {(each.key, each.kind) for each in verify(yard)}


def test_a_report_on_logits_is_known_by_its_place(yard: Yard) -> None:
    report = LogitReport(
        measurement_id="m-v1",
        model="adder",
        revision="v1",
        checkpoint_digest="c" * 64,
        target="cpu",
        settings=LogitValidation(),
        figures=LogitFigures(passed=True, prompts=(True,), made_with={}, seconds=1.0),
        machine={},
    )
    create_document(yard.store, logits_key("m-v1", logits_digest(report.settings)), report)
    assert verify(yard, "samples") == []

    other = logits_key("m-v1", "0123456789ab")
    create_document(yard.store, other, report)
    assert [each.key for each in verify(yard, "samples")] == [other]


def test_what_the_harness_said_is_known_by_its_place(yard: Yard) -> None:
    report = HarnessReport(measurement_id="m-v1", image="", tasks={"gsm8k": ("generate_until",)})
    create_document(yard.store, tasks_key("m-v1"), report)
    assert verify(yard, "samples") == []

    other = tasks_key("m-v2")
    create_document(yard.store, other, report)
    assert [each.key for each in verify(yard, "samples")] == [other]


def test_a_release_that_a_channel_serves_must_be_there(yard: Yard) -> None:
    (stable,) = [each for each in list_releases(yard.store, "adder") if each.revision == "v2"]
    key = release_key("adder", stable.release_id)
    yard.store.delete(key)

    (problem,) = verify(yard, "channels")
    assert (problem.key, problem.kind) == (key, "missing")
    assert problem.message == "It is stable in channel staging of adder."


def test_a_file_that_the_manifest_does_not_list_is_extra(yard: Yard) -> None:
    store_files(yard.store, "checkpoints/adder/v1", {"evil.py": b"import os"})

    (problem,) = verify(yard)
    assert (problem.key, problem.kind) == ("checkpoints/adder/v1/evil.py", "extra")


def test_a_file_of_another_size_says_both(yard: Yard) -> None:
    path = yard.store.local_path("checkpoints/adder/v1/config.json")
    path.chmod(0o644)
    path.write_bytes(b"{} ")

    (problem,) = verify(yard, "checkpoints/adder/v1")
    assert problem.message == "It has 3 bytes; the manifest says 2."


def test_a_bundle_under_another_name_is_wrong(yard: Yard) -> None:
    store_bundle(yard.store, "first")
    for entry in list(yard.store.list("bundles/first")):
        with yard.store.open(entry.key) as stream:
            yard.store.upload(entry.key.replace("first", "other"), stream)

    (problem,) = verify(yard, "bundles/other")
    assert problem.message == "It is the manifest of bundles/first."


def test_a_release_of_an_unknown_signer_is_wrong(yard: Yard, tmp_path: Path) -> None:
    stranger = Settings(home=tmp_path / "stranger", store=str(yard.store.root))

    found = Verifier(yard.store, stranger, POLICY).run(["releases"]).problems

    assert len(found) == 3
    assert all("trust" in each.message for each in found)


def test_cut_downloads_and_unknown_keys_are_worth_a_note(yard: Yard) -> None:
    store_files(yard.store, "checkpoints/adder/cut", {"config.json": b"{"})
    yard.store.create("models/x", b"x")

    verified = Verifier(yard.store, yard.settings, POLICY).run()

    assert [(each.key, each.kind) for each in verified.problems] == [
        ("checkpoints/adder/cut", "note"),
        ("models/x", "note"),
    ]
    assert verified.is_whole


def test_only_what_was_asked_for_is_read(yard: Yard) -> None:
    yard.store.put("plans/adder-v1.json", b"{}")

    assert verify(yard, "checkpoints", "bundles/") == []
    assert verify(yard, "checkpoints/adder/v1/config.json") == []
    with pytest.raises(NotFound, match="nowhere"):
        verify(yard, "nowhere")


class Vanishing(FolderStore):
    """A store from which a checkpoint is collected just when its file is looked at."""

    vanish: Callable[[], None] = staticmethod(lambda: None)

    def open(self, key: str) -> object:  # type: ignore[override]
        if key.endswith("v3/model.safetensors"):
            self.vanish()
        return super().open(key)


def test_what_is_collected_meanwhile_is_no_problem(yard: Yard) -> None:
    store = Vanishing(yard.store.root)

    def vanish() -> None:
        for name in ("manifest.json", "model.safetensors", "config.json"):
            yard.store.delete(f"checkpoints/adder/v3/{name}")

    store.vanish = vanish
    assert Verifier(store, yard.settings, POLICY).run(["checkpoints"]).problems == ()


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Files of 32 MiB are read in chunks of 4, by 4 readers."""
    yard = Yard(tmp_path)
    files = {f"part-{number}": bytes(32 << 20) for number in range(4)}
    entries = store_files(yard.store, "bundles/big", files)
    manifest = BundleManifest(
        compile_key="big",
        lane="cpu",
        key_inputs={},
        files=entries,
        digest=files_digest(entries),
        toolchain={},
        compile_s=1.0,
    )
    create_document(yard.store, bundle_manifest_key("big"), manifest)
    files.clear()

    tracemalloc.start()
    try:
        assert verify(yard) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
