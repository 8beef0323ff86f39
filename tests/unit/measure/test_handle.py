from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from trainyard.documents.measurement import LevelFigures, TaskScore
from trainyard.errors import BadInput, OutOfCapacity, Refused
from trainyard.measure.handle import MeasuringProcess
from trainyard.measure.job import Failure, Job, Outcome, Progress, Ready

JOB = Job(
    base_url="http://127.0.0.1:1",
    served_model_name="adder",
    model_dir="/models/adder",
    max_model_len=256,
    assets_dir="/assets",
    tasks=(),
    levels=(),
)
OUTCOME = Outcome(
    accuracy=(TaskScore(name="addition", metric="exact_match", score=0.9, samples=200),),
    latency=(LevelFigures(name="one", figures={"ttft_p50_ms": 5.0}, duration_s=1.0, completed=24),),
)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., MeasuringProcess]:
    """Return a function that starts a measuring process whose interpreter is a shell script."""

    def start(*lines: str) -> MeasuringProcess:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
        python.chmod(0o755)
        return MeasuringProcess(python, work_dir=tmp_path)

    return start


def tell(*events: Ready | Progress | Outcome | Failure) -> str:
    """Return a line of shell that prints events."""
    lines = "\n".join(event.model_dump_json() for event in events)
    return f"cat <<'END'\n{lines}\nEND"


def run(process: MeasuringProcess, *, check: Callable[[], None] = lambda: None) -> list[object]:
    seen: list[object] = []
    outcome = process.run(
        JOB, on_progress=lambda share, what: seen.append((share, what)), check_server=check
    )
    return [*seen, outcome]


def test_the_job_goes_in_and_the_figures_come_out(
    start: Callable[..., MeasuringProcess], tmp_path: Path
) -> None:
    with start(
        tell(Ready()),
        f'read line; echo "$line" > {tmp_path / "job"}',
        "echo noise >&2",
        tell(Progress(fraction=0.5, message="latency: level one"), OUTCOME),
    ) as process:
        assert run(process) == [(0.5, "latency: level one"), OUTCOME]
    assert Job.model_validate_json((tmp_path / "job").read_text()) == JOB
    assert process.log_path.read_text() == "noise\n"


@pytest.mark.parametrize(("bad_input", "kind"), [(True, BadInput), (False, Refused)])
def test_a_failure_is_told_as_it_was_meant(
    start: Callable[..., MeasuringProcess], bad_input: bool, kind: type[Exception]
) -> None:
    failure = Failure(bad_input=bad_input, message="No such metric.", hint="Use acc.")
    with start("read line", tell(failure), "exit 10") as process, pytest.raises(kind) as caught:
        run(process)
    assert "No such metric." in str(caught.value)
    assert "Use acc." in str(caught.value)


def test_missing_packages_are_told_even_before_the_job(
    start: Callable[..., MeasuringProcess],
) -> None:
    failure = Failure(bad_input=True, message="No lm_eval.", hint="Run `make setup`.")
    with start(tell(failure), "exit 10") as process, pytest.raises(BadInput, match="No lm_eval"):
        run(process)


def test_a_process_that_dies_is_explained_by_its_last_words(
    start: Callable[..., MeasuringProcess],
) -> None:
    with (
        start("read line", "echo 'ImportError: no numpy' >&2", "exit 1") as process,
        pytest.raises(Refused, match="exit code 1: ImportError: no numpy"),
    ):
        run(process)


def test_a_killed_process_points_to_memory(start: Callable[..., MeasuringProcess]) -> None:
    with start("read line", "kill -9 $$") as process, pytest.raises(OutOfCapacity, match="memory"):
        run(process)


def test_half_a_line_is_no_event(start: Callable[..., MeasuringProcess]) -> None:
    with (
        start("read line", 'printf \'{"event": "outc\'', "exit 1") as process,
        pytest.raises(Refused, match="exit code 1"),
    ):
        run(process)


def test_a_dead_server_ends_the_wait(start: Callable[..., MeasuringProcess]) -> None:
    def dead() -> None:
        raise OutOfCapacity("The server ran out of memory.")

    with (
        start("read line", "read never") as process,
        pytest.raises(OutOfCapacity, match="The server"),
    ):
        run(process, check=dead)


def test_leaving_ends_the_process(start: Callable[..., MeasuringProcess]) -> None:
    with start("read never") as process:
        pid = process.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_the_environment_is_an_allow_list(
    start: Callable[..., MeasuringProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    with start("read line", f"env > {tmp_path / 'env'}", tell(OUTCOME)) as process:
        run(process)
    found = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert "AWS_SECRET_ACCESS_KEY" not in found
    assert found["HF_ENDPOINT"] == "http://mirror"
    assert Path(found["HF_DATASETS_CACHE"]).is_relative_to(tmp_path)


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        MeasuringProcess(tmp_path / "nowhere", work_dir=tmp_path)


def test_jobs_survive_json() -> None:
    assert Job.model_validate(json.loads(JOB.model_dump_json())) == JOB
