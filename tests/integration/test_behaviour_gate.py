"""The behaviour checks on real vLLM with the demonstration model, for as long as it takes.

The short form is in test_cpu_lane.py, which starts vLLM anyway.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from scipy.stats import binomtest
from tests.behaviour_world import CAUGHT_BY, check, false_stops
from tests.fake_answers import serving
from tests.tampering_proxy import Fault, TamperingProxy

from trainyard.lanes.cpu import CpuLane
from trainyard.serving.process import ServerProcess, free_port
from trainyard.spec.model import BehaviourName, Target

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"
PROMPTS = REPOSITORY / "dags" / "models" / "adder" / "prompts.jsonl"
NAMES: tuple[BehaviourName, ...] = get_args(BehaviourName)
TARGET = Target(
    name="cpu", lane="cpu", max_model_len=256, max_num_batched_tokens=256, max_num_seqs=16
)
REPEATS = 200

pytestmark = [
    pytest.mark.integration,
    pytest.mark.soak,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the serving environment: `make setup`"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the first revision of the demonstration model, trained in full."""
    folder = tmp_path_factory.mktemp("models")
    command = ["-m", "trainyard.demo.training", "--out", folder, "--revisions", "r1"]
    subprocess.run([PYTHON, *command], check=True, timeout=1800)
    return folder / "r1"


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve it with vLLM; yields the URL."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = CpuLane().command(
        TARGET,
        python=PYTHON,
        model_dir=model,
        cache_dir=folder / "cache",
        served_model_name="adder",
        port=port,
        cache_only=False,
    )
    process = ServerProcess.start(
        command.argv, command.env, port=port, log_path=folder / "server.log"
    )
    try:
        process.wait_healthy(900)
        yield process.url
    finally:
        process.stop(0)


@pytest.mark.parametrize("fault", list(CAUGHT_BY))
def test_a_fault_is_found_by_its_check_and_by_no_other(
    server: str, model: Path, fault: Fault
) -> None:
    with serving(TamperingProxy(server, fault, limit=16).app()) as url:
        found = check(url, model, NAMES, TARGET.max_model_len, requests=16, prompts=PROMPTS)
    assert {each.name for each in found.records if each.count("broken")} == CAUGHT_BY[fault]


def test_a_faithful_server_is_not_stopped(server: str, model: Path) -> None:
    stops = [
        seed
        for seed in range(REPEATS)
        if false_stops(
            server, model, [seed], NAMES, TARGET.max_model_len, requests=16, prompts=PROMPTS
        )
    ]
    interval = binomtest(len(stops), REPEATS).proportion_ci(0.95, "exact")
    print(
        f"False stops: {len(stops)} of {REPEATS}; the rate is between {interval.low:.2%} and "
        f"{interval.high:.2%} (95 %)."
    )
    assert stops == []
