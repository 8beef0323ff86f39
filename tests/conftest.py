"""What every test starts from: no settings of the developer's, an Airflow home to throw away."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# Name what tests marked `aws` and `cluster` run against; no settings of ours.
KEPT = "TRAINYARD_TEST_"

for name in [name for name in os.environ if name.startswith(("TRAINYARD_", "AIRFLOW_"))]:
    if not name.startswith(KEPT):
        del os.environ[name]
# Whoever runs the tests may have set it (pytest's own workers do); consoles would keep that width.
os.environ.pop("COLUMNS", None)
for name in ("HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)

# NumPy reads it once, when it is first imported. A judge's matrices are small: a second thread
# saves little on a free machine, and on a busy one threads that wait for each other use it up.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Airflow reads its home once, when it is first imported, and writes into it.
_airflow_home = tempfile.mkdtemp(prefix="trainyard-tests-airflow-")
atexit.register(shutil.rmtree, _airflow_home, ignore_errors=True)
os.environ["AIRFLOW_HOME"] = _airflow_home
os.environ["HF_TOKEN_PATH"] = f"{_airflow_home}/no-token-of-the-developer"
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"

# A busy machine is no reason for a property to fail, and the same code meets the same examples.
settings.register_profile("trainyard", deadline=None, derandomize=True)
settings.load_profile("trainyard")


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio, like the servers do."""
    return "asyncio"
