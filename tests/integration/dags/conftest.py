"""One parse of the DAG files for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def dag_bag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a DagBag of the repository's DAG files, parsed as strictly as Airflow can."""
    home = tmp_path_factory.mktemp("home")
    names = {
        "TRAINYARD_HOME": str(home),
        "TRAINYARD_CATALOGUE": str(REPOSITORY / "dags" / "models"),
        "TRAINYARD_ENVIRONMENTS": str(REPOSITORY / "dags" / "environments.yaml"),
        # A value that changes between two parses would make a new DAG version each time.
        "AIRFLOW__DAG_PROCESSOR__DAG_VERSION_INFLATION_CHECK_LEVEL": "error",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        from trainyard.settings import get_settings

        get_settings.cache_clear()
        from airflow.dag_processing.dagbag import DagBag

        yield DagBag(os.fspath(REPOSITORY / "dags"))
        get_settings.cache_clear()
