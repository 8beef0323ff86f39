"""From the params of a run to a request of the domain."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context

from trainyard.documents.plan import ReleaseRequest

PARAMS: dict[str, Any] = {
    "model": "adder",
    "revision": None,
    "targets": [],
    "environments": [],
    "overrides": {},
}


def test_empty_fields_mean_the_defaults() -> None:
    from trainyard_airflow.requests import release_request

    empty = make_context(dict.fromkeys(PARAMS) | {"model": "adder"})
    assert release_request(make_context(PARAMS)) == ReleaseRequest(model="adder")
    assert release_request(empty) == ReleaseRequest(model="adder")


def test_everything_is_passed_on_in_order() -> None:
    from trainyard_airflow.requests import release_request

    params = {
        "model": "adder",
        "revision": "r2",
        "targets": ["cpu", "trn2"],
        "environments": ["staging", "production"],
        "overrides": {"max_num_seqs": 1},
    }
    assert release_request(make_context(params)) == ReleaseRequest(
        model="adder",
        revision="r2",
        targets=("cpu", "trn2"),
        environments=("staging", "production"),
        overrides={"max_num_seqs": 1},
    )


def test_params_of_another_shape_are_refused() -> None:
    from trainyard_airflow.exceptions import StepRefused
    from trainyard_airflow.requests import release_request

    with pytest.raises(StepRefused, match="not a release request"):
        release_request(make_context({**PARAMS, "overrides": ["max_num_seqs"]}))


@pytest.mark.parametrize("conf", [None, {}, {"model": "adder"}, {"model": "x", "revision": "r"}])
def test_known_keys_pass(conf: dict[str, Any] | None) -> None:
    from trainyard_airflow.requests import refuse_unknown_keys

    refuse_unknown_keys(conf, PARAMS)


def test_unknown_keys_are_all_named() -> None:
    from trainyard_airflow.exceptions import StepRefused
    from trainyard_airflow.requests import refuse_unknown_keys

    with pytest.raises(StepRefused, match="unknown keys: a, b"):
        refuse_unknown_keys({"b": 1, "model": "adder", "a": 2}, PARAMS)
