"""A reference that was made elsewhere counts only if it is the one that is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.steps.lane_bench import Bench
from tests.unit.steps.test_measure import made_reference, with_parity

from trainyard.documents.parity import Reference
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, NotFound, OutOfCapacity, Refused
from trainyard.measure.reference import ReferenceJob
from trainyard.steps.context import StepContext
from trainyard.steps.reference import import_reference
from trainyard.store.documents import read_document


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def plan(bench: Bench) -> Plan:
    return with_parity(bench, reference="imported")


def surroundings(bench: Bench, script: str) -> StepContext:
    """Return surroundings whose serving interpreter is a shell script; OUT is its result."""
    python = bench.home / "python"
    python.write_text(f"#!/bin/sh\nOUT=$4\ncat > {bench.home}/job.json\n{script}\n")
    python.chmod(0o755)
    made = bench.surroundings("reference", serve_python=python)
    made.work_dir.mkdir(parents=True, exist_ok=True)
    return made


def file_of(bench: Bench, plan: Plan, tmp_path: Path, **changes: Any) -> tuple[str, Path]:
    """Write the reference that the plan needs, with some fields changed, into a file."""
    key, reference = made_reference(bench, plan, tmp_path / "assets")
    path = tmp_path / "reference.json"
    path.write_bytes(reference.model_copy(update=changes).to_bytes())
    return key, path


def test_a_reference_from_elsewhere_is_stored_and_found_again(
    bench: Bench, plan: Plan, tmp_path: Path
) -> None:
    key, path = file_of(bench, plan, tmp_path)
    context = surroundings(bench, "exit 1")
    result = import_reference(plan, "cpu", context, file=path)
    assert (result.key, result.reused) == (key, False)
    assert read_document(bench.store, key, Reference).settings.max_tokens == 8
    assert import_reference(plan, "cpu", context, file=path).reused
    assert import_reference(plan, "cpu", context).reused


def test_without_a_file_it_is_made_here_from_the_stored_checkpoint(
    bench: Bench, plan: Plan, tmp_path: Path
) -> None:
    key, path = file_of(bench, plan, tmp_path)
    result = import_reference(plan, "cpu", surroundings(bench, f"cp {path} $OUT"))
    assert (result.key, result.reused) == (key, False)
    job = ReferenceJob.model_validate_json((bench.home / "job.json").read_text())
    assert job.prompts == ("1+1=",)
    assert Path(job.model_dir, "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("echo 'no such architecture' >&2; exit 20", Refused, "no such architecture"),
        ("exit 40", OutOfCapacity, "not enough memory"),
        ("kill -9 $$", OutOfCapacity, "not enough memory"),
        ("exit 0", Refused, "it wrote nothing"),
    ],
)
def test_one_that_cannot_be_made_says_why(
    bench: Bench, plan: Plan, script: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        import_reference(plan, "cpu", surroundings(bench, script))
    assert not list(bench.store.list("references"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint_digest": "f" * 64}, "another checkpoint"),
        ({"answers": ()}, "not whole"),
    ],
)
def test_a_reference_of_something_else_is_refused(
    bench: Bench, plan: Plan, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    _, path = file_of(bench, plan, tmp_path, **changes)
    with pytest.raises(BadInput, match=words):
        import_reference(plan, "cpu", surroundings(bench, "exit 1"), file=path)
    assert not list(bench.store.list("references"))


def test_a_reference_for_other_prompts_is_refused(bench: Bench, plan: Plan, tmp_path: Path) -> None:
    _, path = file_of(bench, with_parity(bench, num_prompts=2), tmp_path)
    with pytest.raises(BadInput, match="other prompts, lengths or number formats"):
        import_reference(plan, "cpu", surroundings(bench, "exit 1"), file=path)


def test_half_a_file_and_none_are_named(bench: Bench, plan: Plan, tmp_path: Path) -> None:
    _, path = file_of(bench, plan, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    context = surroundings(bench, "exit 1")
    with pytest.raises(BadInput, match=r"reference\.json"):
        import_reference(plan, "cpu", context, file=path)
    with pytest.raises(NotFound, match="cannot be read"):
        import_reference(plan, "cpu", context, file=tmp_path / "none.json")


def test_a_spec_without_parity_needs_no_reference(bench: Bench) -> None:
    with pytest.raises(BadInput, match="no parity check"):
        import_reference(bench.plan, "cpu", surroundings(bench, "exit 1"))
