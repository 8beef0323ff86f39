"""Every row of the table recognises what it is for, and nothing that is ordinary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fake_neuron import FATAL_MISS
from tests.unit.failures.excerpts import LOGS, PODS, disrupted, node, pod

from trainyard.errors import BadInput, CacheMiss, OutOfCapacity, Refused, Transient
from trainyard.failures.recognise import (
    compiler_code,
    container_exit_code,
    pod_evidence,
    recognise_log,
    recognise_pod,
)
from trainyard.failures.table import ALL, LOG, POD, Action, markdown, row_of

DOCS = Path(__file__).parents[3] / "docs" / "failures.md"


@pytest.mark.parametrize("row", LOG, ids=lambda row: row.code)
def test_a_log_is_recognised(row: Any) -> None:
    failure = recognise_log(
        f"INFO an ordinary line\n{LOGS[row.code]}Traceback (most recent call)\n"
    )
    assert failure is not None
    assert failure.hint == row.hint
    assert (failure.action, failure.exit_code) == (row.action, row.exit_code)
    assert failure.reason.startswith(row.reason.rstrip("."))


@pytest.mark.parametrize("row", POD, ids=lambda row: row.code)
def test_a_pod_is_recognised(row: Any) -> None:
    failure = recognise_pod(*PODS[row.code])
    assert failure is not None
    assert (failure.code, failure.hint) == (row.code, row.hint)


def test_every_excerpt_belongs_to_a_row() -> None:
    assert set(LOGS) == {row.code for row in LOG}
    assert set(PODS) == {row.code for row in POD}


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.code)
def test_every_row_says_what_happened_what_helps_and_where_that_is_from(row: Any) -> None:
    assert row.reason.endswith(".")
    assert row.hint.endswith(".")
    assert row.source
    assert (row.exit_code in (10, 20)) == (row.action is Action.STOP)
    assert bool(row.change) == (row.action is Action.CHANGE)
    first = row_of(row.code)
    assert first is not None
    assert first.change == row.change


@pytest.mark.parametrize(
    "log",
    [
        "INFO Starting vLLM API server 0 on http://127.0.0.1:8000\nINFO compiled 70 graphs\n",
        "neuronx-cc compile graph.hlo --framework XLA --target trn2 --lnc=2\n"
        "Compiler status PASS\n",
        "INFO neuron device count: 16; NRT version: 2.34.10\n",
        "RuntimeError: something of vLLM\n",
        "",
    ],
)
def test_what_is_ordinary_is_no_failure(log: str) -> None:
    assert recognise_log(log) is None


class TestWhichComesFirst:
    def test_a_killed_compiler_is_more_than_its_exit_code(self) -> None:
        failure = recognise_log(LOGS["compiler-exit-70"] + LOGS["F137"])
        assert failure is not None
        assert failure.code == "F137"

    def test_the_code_is_the_compilers_own(self) -> None:
        failure = recognise_log("[ERROR] [NCC_EXSP001] The combined memory needed …\n")
        assert failure is not None
        assert failure.code == "NCC_EXSP001"
        assert "exceeds" not in failure.code
        assert "more memory than a device has" in failure.reason

    def test_a_broken_device_explains_a_killed_pod(self) -> None:
        failure = recognise_pod(
            pod(terminated={"exitCode": 137, "reason": "OOMKilled"}),
            node(health="NeuronHasError_DMA_ERROR"),
        )
        assert failure is not None
        assert failure.code == "device-fault"

    def test_an_eviction_for_memory_is_one_for_memory(self) -> None:
        failure = recognise_pod(
            pod(reason="Evicted", message="The node was low on resource: memory. Threshold …")
        )
        assert failure is not None
        assert failure.code == "host-out-of-memory"

    def test_a_node_that_shut_down_evicted_nobody(self) -> None:
        failure = recognise_pod(
            pod(conditions=(disrupted("TerminationByKubelet", "Pod was terminated …"),))
        )
        assert failure is not None
        assert failure.code == "node-gone"

    def test_a_kill_without_a_reason_is_most_likely_for_memory(self) -> None:
        failure = recognise_pod(pod(terminated={"exitCode": 137, "reason": "Error"}), node())
        assert failure is not None
        assert (failure.code, failure.exit_code) == ("host-out-of-memory", 40)


def test_a_step_that_refused_is_no_failure_of_its_pod() -> None:
    assert recognise_pod(pod(terminated={"exitCode": 20, "reason": "Error"}), node()) is None


def test_a_pod_that_is_well_has_no_failure() -> None:
    running = pod(phase="Running")
    assert recognise_pod(running, node()) is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NCC_EVRF056", BadInput),
        ("NCC_EVRF009", Refused),
        ("device-fault", Transient),
        ("F137", OutOfCapacity),
        ("cache-miss", CacheMiss),
    ],
)
def test_a_failure_becomes_the_error_of_its_exit_code(code: str, kind: type[Exception]) -> None:
    failure = recognise_log(LOGS[code])
    assert failure is not None
    error = failure.error()
    assert type(error) is kind
    assert (error.code, error.exit_code) == (code, failure.exit_code)
    assert error.hint == failure.hint


def test_the_plugins_own_refusal_to_compile_is_known() -> None:
    failure = recognise_log(FATAL_MISS.format(key="0f" * 16))
    assert failure is not None
    assert failure.code == "cache-miss"


def test_the_last_code_of_the_compiler_counts() -> None:
    assert compiler_code("NCC_EVRF009 then NCC_INLA001 and NCC_x1") == "NCC_INLA001"
    assert compiler_code("nothing") == ""


def test_evidence_is_cut_to_a_line_that_can_be_read() -> None:
    failure = recognise_log(f"[NCC_EVRF009] {'word ' * 500}\n")
    assert failure is not None
    assert len(failure.reason) < 450
    assert "\n" not in failure.reason


def test_the_exit_code_of_a_container() -> None:
    assert container_exit_code(pod(terminated={"exitCode": 30})) == 30
    assert container_exit_code(pod(phase="Running")) is None
    assert container_exit_code(None) is None


def test_containers_that_did_their_work_are_no_evidence() -> None:
    finished = pod(phase="Succeeded", terminated={"exitCode": 0, "reason": "Completed"})
    assert list(pod_evidence(finished)) == ["phase Succeeded"]


def test_the_documentation_has_the_table() -> None:
    assert markdown().strip() in DOCS.read_text()
