"""Behaviour, parity and the whole accuracy gate on real vLLM, for as long as it takes.

The server is a faithful one, or has a proxy before it that spoils one thing. The short form is in
test_cpu_lane.py, which starts vLLM anyway; other files than the checkpoint's are in test_parity.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from tests.behaviour_world import CAUGHT_BY, check
from tests.fake_answers import serving
from tests.gate_runs import broken_cases, rate, verdicts
from tests.parity_runs import Run, Runs, broken, figures_of, sums
from tests.tampering_proxy import Fault, TamperingProxy

from trainyard.lanes.cpu import CpuLane
from trainyard.measure.parity import collect
from trainyard.serving.process import ServerProcess, free_port
from trainyard.spec.loader import load_spec
from trainyard.spec.model import BehaviourName, Target

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"
PROMPTS = REPOSITORY / "dags" / "models" / "adder" / "prompts.jsonl"
NAMES: tuple[BehaviourName, ...] = get_args(BehaviourName)
TARGET = Target(
    name="cpu", lane="cpu", max_model_len=256, max_num_batched_tokens=256, max_num_seqs=16
)
REPEATS = 200
"""Runs of the whole gate."""
SET_SIZE = 40
"""Prompts of one run's parity check, as the demonstration's spec has them."""

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
    """One server; each run asks with other prompts, as if it were another release's measurement."""
    parity_check = load_spec(REPOSITORY / "dags" / "models" / "adder.yaml").gates.accuracy.parity
    assert parity_check is not None
    behaviour = [
        check(server, model, NAMES, TARGET.max_model_len, requests=16, seed=seed, prompts=PROMPTS)
        for seed in range(REPEATS)
    ]
    prompts = sums(REPEATS * SET_SIZE, seed=2)
    served = collect(
        prompts,
        base_url=server,
        served_model_name="adder",
        max_tokens=parity_check.max_tokens,
        top_logprobs=parity_check.top_logprobs,
    )
    (parity,) = figures_of(
        Runs(
            check=parity_check,
            set_size=SET_SIZE,
            prompts=tuple(prompts),
            served=tuple(served),
            runs=(Run(name="faithful", model=str(model), sets=REPEATS),),
        )
    ).values()
    found = list(verdicts(parity_check, parity, behaviour))
    stops = [each.summary for each in found if each.outcome == "fail"]
    ratios = sorted(each.error_ratio or 0.0 for each in parity)
    told = {
        "behaviour": rate(sum(bool(broken_cases(each)) for each in behaviour), REPEATS),
        "parity": rate(sum(bool(broken(parity_check, each)) for each in parity), REPEATS),
        "error_ratio": [round(ratios[0], 3), round(ratios[-1], 3)],
        "the whole gate": rate(len(stops), REPEATS),
        "warnings": sum(each.outcome == "warn" for each in found),
    }
    print("False stops:", json.dumps(told, indent=2))
    # Two of 200 would be a rate of 0.1 to 3.6 %.
    assert len(stops) <= REPEATS // 100, stops
