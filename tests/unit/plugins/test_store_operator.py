"""Garbage collection as a task: the command that it runs, and what becomes of its end."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context
from tests.unit.yard import Yard


def operator(look_only: str) -> Any:
    from trainyard_airflow.store_operator import CollectGarbageOperator

    return CollectGarbageOperator(task_id="collect", look_only=look_only)


def test_only_a_run_that_is_not_dry_deletes(yard: Yard) -> None:
    wet, dry, unclear = (
        operator(word).command(yard.home)[1:] for word in ("False", "True", "{{ params.x }}")
    )
    assert wet == ["-m", "trainyard", "store", "gc", "--delete", "--die-with-parent"]
    # Whatever is not clearly "no" deletes nothing.
    assert dry == unclear == ["-m", "trainyard", "store", "gc"]


def test_it_collects_in_the_store_of_this_installation(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.store.create("bundles/left-over/graph.bin", b"x")

    assert operator("True").execute(make_context(dag_id="neuron_gc")) == "dry run"
    assert yard.store.exists("bundles/left-over/graph.bin")

    monkeypatch.setenv("TRAINYARD_GC_GRACE_S", "0")
    monkeypatch.setenv("TRAINYARD_GC_PAUSE_S", "0")
    assert operator("False").execute(make_context(dag_id="neuron_gc")) == "collected"
    assert not yard.store.exists("bundles/left-over/graph.bin")


def test_a_store_that_cannot_be_judged_is_not_tried_again(yard: Yard) -> None:
    from trainyard_airflow.exceptions import StepRefused

    yard.store.create("channels/adder/staging.json", b"{}")

    with pytest.raises(StepRefused, match="exit code 10"):
        operator("False").execute(make_context(dag_id="neuron_gc"))


def test_a_misspelt_wish_to_look_only_deletes_nothing(yard: Yard) -> None:
    from trainyard_airflow.exceptions import StepRefused

    context = make_context({"dry_run": False}, conf={"dryrun": True}, dag_id="neuron_gc")
    with pytest.raises(StepRefused, match="unknown keys: dryrun"):
        operator("False").execute(context)
