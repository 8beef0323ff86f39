"""The step `tasks` asks a real lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit import yard

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.steps.context import StepContext
from trainyard.steps.tasks import check_tasks
from trainyard.store.folder import FolderStore

PYTHON = Path(__file__).parents[2] / ".venv-serve" / "bin" / "python"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the serving environment: `make setup`"),
]


def test_an_unknown_task_and_a_data_set_out_of_reach_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own = [{"name": name, "min": 0.5} for name in ("gsm8k", "gsm8k_kot")]
    plan = yard.plan(model_spec=yard.spec_with_tasks(own))
    settings = Settings(home=tmp_path, serve_python=PYTHON)
    store = FolderStore(tmp_path / "store")

    with pytest.raises(BadInput) as refused:
        check_tasks(plan, "cpu", StepContext(settings, store, yard.Silent(), tmp_path))

    said = str(refused.value)
    assert "Accuracy task gsm8k: It cannot be loaded with its data set: " in said
    assert "Accuracy task gsm8k_kot: lm-evaluation-harness knows no such task." in said
    assert not list(store.list("samples"))
