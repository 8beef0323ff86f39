from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from tests.unit import yard

from trainyard.documents.plan import PlannedStep
from trainyard.documents.status import StepStatus
from trainyard.errors import (
    BadInput,
    Busy,
    CorruptFile,
    NotFound,
    OutOfCapacity,
    Refused,
    StorageFull,
    Transient,
)
from trainyard.failures.tuning import Tuning
from trainyard.settings import Settings
from trainyard.spec.model import Target
from trainyard.steps.after_failure import NOTHING_LEFT
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.runner import run_step
from trainyard.steps.status import read_status
from trainyard.steps.stopping import LOCK_LOST, PARENT_GONE, Stopper
from trainyard.store.documents import create_document, read_document, update_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import lock_key, plan_key
from trainyard.store.locks import Holder, StepLock, acquire_lock

RESULT = StepResult(key="bundles/x/manifest.json", reused=False, message="Made it.")


class Bench:
    """Runs steps named `compile` for the target `cpu` of a plan `p1`."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, step_lock_s=3600, step_lock_wait_s=0)
        self.store = FolderStore(self.settings.store_root)
        self.output = io.StringIO()

    def run(self, body: Callable[[StepContext], StepResult], **options: object) -> int:
        arguments: dict[str, object] = {
            "plan_id": "p1",
            "target": "cpu",
            "body": body,
            "settings": self.settings,
            "store": self.store,
            "console": Console(file=self.output),
        }
        return run_step("compile", **{**arguments, **options})  # type: ignore[arg-type]

    @property
    def status(self) -> StepStatus:
        status = read_status(self.store, "p1", "compile", "cpu")
        assert status is not None
        return status


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def _signals_are_given_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def fail(error: BaseException) -> Callable[[StepContext], StepResult]:
    def body(context: StepContext) -> StepResult:
        raise error

    return body


class TestTheNextTry:
    """What a known failure leaves for the next try of the same step."""

    NATIVE = Target.model_validate(
        {
            "name": "cpu",  # the bench's
            "lane": "neuron-native",
            "instance": "trn2.48xlarge",
            "neuron": {"sdk": "2.32.0"},
        }
    )

    @pytest.fixture
    def native(self, bench: Bench) -> Bench:
        made = yard.plan("p1")
        planned = made.targets[0].model_copy(update={"target": self.NATIVE})
        made = made.model_copy(update={"targets": (planned,)})
        create_document(bench.store, plan_key("p1"), made)
        return bench

    def test_less_memory_means_fewer_compilers_each_time(self, native: Bench) -> None:
        seen: list[Tuning] = []

        def body(context: StepContext) -> StepResult:
            seen.append(context.tuning)
            raise OutOfCapacity("It was killed.", hint="Take a larger one.", code="F137")

        codes = [native.run(body) for _ in range(4)]
        assert seen == [Tuning(), Tuning(4, 1), Tuning(2, 2), Tuning(1, 3)]
        assert codes == [40, 40, 40, 20]
        status = native.status
        assert (status.code, status.exit_code, status.attempt) == ("F137", 20, 4)
        assert status.hint == f"{NOTHING_LEFT} Take a larger one."

    def test_a_race_leaves_one_compiler_and_then_stops(self, native: Bench) -> None:
        error = OutOfCapacity("A file was gone.", code="NCC_EVRF059")
        assert native.run(fail(error)) == 40
        assert native.status.tuning == {"parallel_compile_workers": 1}
        assert native.run(fail(error)) == 20

    def test_another_failure_keeps_what_was_changed(self, native: Bench) -> None:
        native.run(fail(OutOfCapacity("It was killed.", code="F137")))
        native.run(fail(Transient("The store is slow.")))
        assert native.status.tuning == {"parallel_compile_workers": 4, "out_of_memory": 1}
        assert native.status.code == ""

    def test_after_success_everything_is_as_usual(self, native: Bench) -> None:
        seen: list[Tuning] = []

        def body(context: StepContext) -> StepResult:
            seen.append(context.tuning)
            return StepResult("k", reused=False, message="Done.")

        native.run(fail(OutOfCapacity("It was killed.", code="F137")))
        native.run(body)
        native.run(body)
        assert seen == [Tuning(4, 1), Tuning()]

    def test_a_step_without_compilers_is_tried_again_as_before(self, bench: Bench) -> None:
        for count in (1, 2, 3, 4):
            assert bench.run(fail(MemoryError())) == 40
            assert bench.status.tuning == {"out_of_memory": count}

    def test_codes_that_only_stop_change_nothing(self, native: Bench) -> None:
        assert native.run(fail(Refused("No.", code="NCC_EVRF009"))) == 20
        assert (native.status.code, native.status.tuning) == ("NCC_EVRF009", {})


class TestOutcomes:
    def test_done(self, bench: Bench) -> None:
        def body(context: StepContext) -> StepResult:
            assert context.work_dir.is_dir()
            context.ensure_held()
            context.progress.say("Working.")
            assert not context.force
            return StepResult("k", reused=True, message="Found it.", detail={"files": 2})

        assert bench.run(body) == 0
        status = bench.status
        assert (status.state, status.exit_code, status.reused) == ("done", 0, True)
        assert (status.reason, status.output_key) == ("Found it.", "k")
        assert (status.progress, status.detail) == (1.0, {"files": 2})
        assert status.log_tail == ("Working.",)
        assert "compile: Found it. (found k)" in bench.output.getvalue()

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (BadInput("Wrong.", hint="Do it."), 10),
            (NotFound("Wrong.", hint="Do it."), 10),
            (CorruptFile("Wrong.", hint="Do it."), 10),
            (Refused("Wrong.", hint="Do it."), 20),
            (Transient("Wrong.", hint="Do it."), 30),
            (StorageFull("Wrong.", hint="Do it."), 30),
            (OutOfCapacity("Wrong.", hint="Do it."), 40),
            (Busy("Wrong.", hint="Do it."), 75),
        ],
    )
    def test_errors_of_ours(self, bench: Bench, error: Exception, code: int) -> None:
        assert bench.run(fail(error)) == code
        status = bench.status
        assert (status.state, status.exit_code) == ("failed", code)
        assert (status.reason, status.hint) == ("Wrong.", "Do it.")
        assert status.log_tail == ()
        assert f"compile failed (exit {code}): Wrong. Do it." in bench.output.getvalue()

    @pytest.mark.parametrize(
        ("error", "code", "reason"),
        [
            (RuntimeError("boom"), 1, "RuntimeError: boom"),
            (SystemExit(0), 1, "SystemExit"),
            (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
            (MemoryError(), 40, "ran out of memory"),
            (OSError(errno.ENOSPC, "No space", "/x"), 30, r"No room is left on the disk (/x)"),
            (OSError(errno.EDQUOT, "Quota"), 30, "No room is left on the disk"),
            (OSError(errno.EIO, "I/O"), 1, "OSError"),
        ],
    )
    def test_other_errors(self, bench: Bench, error: BaseException, code: int, reason: str) -> None:
        assert bench.run(fail(error)) == code
        assert reason in bench.status.reason
        assert bench.status.hint
        assert bench.status.exit_code == code
        assert any("Traceback" in line for line in bench.status.log_tail)
        assert any("raise error" in line for line in bench.status.log_tail)

    def test_names_that_cannot_be_keys(self, bench: Bench) -> None:
        assert bench.run(fail(AssertionError()), plan_id="../x") == 10
        assert "'../x' is not valid" in bench.output.getvalue()

    def test_a_result_that_cannot_be_stored_is_reported(self, bench: Bench) -> None:
        result = StepResult("k", reused=False, message="Made it.", detail={"what": object()})
        assert bench.run(lambda context: result) == 0
        assert "status document could not be written" in bench.output.getvalue()

    def test_a_store_that_cannot_be_written(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(descriptor: int, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", refuse)
        assert bench.run(lambda context: RESULT) == 30
        assert "No space left" in bench.output.getvalue()

    def test_a_work_folder_that_cannot_be_made(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "work").write_text("in the way")
        assert bench.run(lambda context: RESULT) == 1
        assert "NotADirectoryError" in bench.status.reason

    def test_the_work_folder_lasts_until_the_step_is_done(self, bench: Bench) -> None:
        def cut(context: StepContext) -> StepResult:
            (context.work_dir / "half").write_text("half")
            raise Transient("cut")

        def resumed(context: StepContext) -> StepResult:
            assert (context.work_dir / "half").read_text() == "half"
            return RESULT

        assert bench.run(cut) == 30
        assert bench.run(resumed) == 0
        assert bench.status.attempt == 2
        assert not (bench.settings.work_root / "p1" / "compile" / "cpu").exists()

    def test_it_also_runs_outside_the_main_thread(self, bench: Bench) -> None:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(bench.run(lambda context: RESULT)))
        thread.start()
        thread.join()
        assert codes == [0]


class TestLocking:
    def hold(self, bench: Bench, *, work: str) -> StepLock:
        """Make the lock that of a living process of another machine."""
        key = lock_key("p1/compile/cpu")
        acquire_lock(bench.store, "p1/compile/cpu", work=work, duration_s=3600, wait_s=0).release()
        holder = Holder.me(work).model_copy(update={"machine": "another"})
        return update_document(
            bench.store, key, StepLock, lambda lock: lock.model_copy(update={"holder": holder})
        )

    def test_another_attempt_at_the_same_keeps_its_status(self, bench: Bench) -> None:
        self.hold(bench, work="compile cpu of plan p1")
        assert bench.run(fail(AssertionError("ran"))) == 75
        assert read_status(bench.store, "p1", "compile", "cpu") is None
        assert "is being done by process" in bench.output.getvalue()

    def test_a_wait_for_another_plan_shows_in_our_status(self, bench: Bench) -> None:
        self.hold(bench, work="compile cpu of plan p2")
        bench.settings = bench.settings.model_copy(update={"step_lock_wait_s": 0.01})
        assert bench.run(fail(AssertionError("ran"))) == 75
        assert (bench.status.state, bench.status.exit_code) == ("failed", 75)
        assert any("compile cpu of plan p2" in line for line in bench.status.log_tail)

    def test_the_lock_is_free_afterwards(self, bench: Bench) -> None:
        for error in (Transient("x"), RuntimeError("x")):
            bench.run(fail(error))
            lock = read_document(bench.store, lock_key("p1/compile/cpu"), StepLock)
            assert lock.holder is None

    def test_two_plans_that_make_the_same_share_a_lock(self, bench: Bench) -> None:
        planned = yard.plan("p1").model_copy(
            update={
                "steps": (
                    PlannedStep(step="download", key="other", exists=False, reason=""),
                    PlannedStep(
                        step="compile", target="cpu", key="bundles/x", exists=False, reason=""
                    ),
                )
            }
        )
        create_document(bench.store, plan_key("p1"), planned)
        held: list[str] = []

        def body(context: StepContext) -> StepResult:
            holder = read_document(bench.store, lock_key("bundles/x"), StepLock).holder
            assert holder is not None
            held.append(holder.work)
            return RESULT

        assert bench.run(body) == 0
        assert held == ["compile cpu of plan p1"]

    def test_a_caller_may_name_the_lock(self, bench: Bench) -> None:
        assert bench.run(lambda context: RESULT, lock_on="mine/own") == 0
        assert bench.store.exists("locks/mine/own.json")

    @pytest.mark.parametrize("same", [True, False])
    def test_a_step_that_lost_its_lock_stops(self, bench: Bench, same: bool) -> None:
        bench.settings = bench.settings.model_copy(update={"step_lock_s": 0.3})
        successor = Holder.me("compile cpu of plan p1" if same else "of another plan")
        key = lock_key("p1/compile/cpu")

        def body(context: StepContext) -> StepResult:
            update_document(
                bench.store,
                key,
                StepLock,
                lambda lock: lock.model_copy(update={"holder": successor, "epoch": 2}),
            )
            threading.Event().wait(60)
            raise AssertionError("was not stopped")

        assert bench.run(body) == 75
        assert bench.status.state == ("running" if same else "failed")
        assert LOCK_LOST in bench.output.getvalue()
        assert read_document(bench.store, key, StepLock).holder == successor

    def test_what_was_committed_before_the_loss_counts(self, bench: Bench) -> None:
        bench.settings = bench.settings.model_copy(update={"step_lock_s": 3600})

        def body(context: StepContext) -> StepResult:
            bench.store.delete(lock_key("p1/compile/cpu"))
            return RESULT

        assert bench.run(body) == 0
        assert bench.status.state == "done"


class TestStopping:
    @pytest.mark.parametrize(
        ("number", "reason"),
        [
            (signal.SIGTERM, "Stopped by SIGTERM."),
            (signal.SIGINT, "Stopped from the keyboard."),
            (signal.SIGHUP, "Stopped because its terminal was closed."),
        ],
    )
    def test_a_signal_ends_the_step_and_lets_it_clean_up(
        self, bench: Bench, number: int, reason: str
    ) -> None:
        cleaned = []

        def body(context: StepContext) -> StepResult:
            try:
                os.kill(os.getpid(), number)
                threading.Event().wait(60)
            finally:
                # A second signal does not disturb the cleaning.
                os.kill(os.getpid(), number)
                cleaned.append(True)
            raise AssertionError("was not stopped")

        # Whoever started the tests in the background let them ignore some signals.
        before = signal.signal(number, signal.SIG_DFL)
        try:
            assert bench.run(body) == 30
        finally:
            signal.signal(number, before)
        assert cleaned == [True]
        assert (bench.status.state, bench.status.reason) == ("failed", reason)
        assert read_document(bench.store, lock_key("p1/compile/cpu"), StepLock).holder is None

    def test_an_ignored_hangup_stays_ignored(self, bench: Bench) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:

            def body(context: StepContext) -> StepResult:
                os.kill(os.getpid(), signal.SIGHUP)
                return RESULT

            assert bench.run(body) == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_signal_while_it_waits_for_the_lock(self, bench: Bench) -> None:
        TestLocking().hold(bench, work="compile cpu of plan p2")
        bench.settings = bench.settings.model_copy(update={"step_lock_wait_s": 600})
        said = threading.Event()

        class Output(io.StringIO):
            def write(self, text: str, /) -> int:
                if "Waiting" in text:
                    said.set()
                return super().write(text)

        def stop() -> None:
            assert said.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)

        bench.output = Output()
        thread = threading.Thread(target=stop)
        thread.start()
        assert bench.run(fail(AssertionError("ran"))) == 30
        thread.join()
        assert bench.status.reason == "Stopped by SIGTERM."

    def test_after_the_end_a_wish_to_stop_changes_nothing(self) -> None:
        with Stopper() as stopper:
            stopper.disarm()
            stopper.request("too late")
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.reason == ""


STEP = """
import os, subprocess, sys, threading
from pathlib import Path
from trainyard.settings import Settings
from trainyard.steps.context import StepResult
from trainyard.steps.runner import run_step
from trainyard.store.folder import FolderStore

settings = Settings(home=Path(sys.argv[1]), step_lock_wait_s=0)
mode = sys.argv[2]

def body(context):
    if mode == "quick":
        return StepResult("k", reused=False, message="Made it.")
    if mode == "chatty":
        for n in range(10_000):
            context.progress.say("x" * 100)
        return StepResult("k", reused=False, message="Made it.")
    child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, start_new_session=True)
    announced = False
    while True:
        try:
            # From the announcement on, the test may stop this process at any line.
            if not announced:
                announced = True
                print("READY", child.pid, flush=True)
            threading.Event().wait(600)
        except BaseException:
            if mode != "deaf":
                raise

sys.exit(run_step("measure", plan_id="p1", body=body, settings=settings,
                  store=FolderStore(settings.store_root), die_with_parent=True,
                  grace_s=0.5 if mode == "deaf" else 60))
"""


class Process:
    """A step in a process of its own."""

    def __init__(self, home: Path, mode: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", STEP, str(home), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.store = FolderStore(Settings(home=home).store_root)
        self.child: psutil.Process | None = None

    def wait_until_ready(self) -> psutil.Process:
        """Return the process that the step started."""
        assert self.popen.stdout is not None
        word, pid = self.popen.stdout.readline().split()
        assert word == "READY"
        self.child = psutil.Process(int(pid))
        return self.child

    def close_stdin(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def end(self) -> tuple[int, str]:
        """Wait for its end (with its standard input open) and return exit code and output."""
        code = self.popen.wait(timeout=600)
        assert self.popen.stdout is not None
        return code, self.popen.stdout.read()

    @property
    def status(self) -> StepStatus:
        status = read_status(self.store, "p1", "measure")
        assert status is not None
        return status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    started: list[Process] = []

    def begin(mode: str) -> Process:
        started.append(Process(tmp_path, mode))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()
        if process.child is not None:
            with suppress(psutil.NoSuchProcess):
                process.child.kill()
        for pipe in (process.popen.stdin, process.popen.stdout):
            if pipe is not None:
                pipe.close()


def gone(child: psutil.Process) -> bool:
    return not psutil.wait_procs([child], timeout=600)[1]


class TestProcesses:
    def test_it_stops_with_its_parent(self, start: Callable[[str], Process]) -> None:
        process = start("willing")
        child = process.wait_until_ready()
        process.close_stdin()
        code, output = process.end()
        assert code == 30
        assert PARENT_GONE in output
        assert process.status.reason == PARENT_GONE
        assert gone(child)

    def test_a_step_that_does_not_react_is_ended_with_its_children(
        self, start: Callable[[str], Process]
    ) -> None:
        process = start("deaf")
        child = process.wait_until_ready()
        process.popen.terminate()
        code, _ = process.end()
        assert code == 30
        assert gone(child)
        assert process.status.reason.startswith("Stopped by SIGTERM. It did not end within")

    def test_after_a_kill_the_next_attempt_starts_at_once(
        self, start: Callable[[str], Process]
    ) -> None:
        process = start("willing")
        child = process.wait_until_ready()
        process.popen.kill()
        process.popen.wait()
        child.kill()
        assert process.status.state == "running"
        again = start("quick")
        assert again.end()[0] == 0
        assert (again.status.state, again.status.attempt) == ("done", 2)

    def test_a_second_attempt_beside_a_living_one_is_busy(
        self, start: Callable[[str], Process]
    ) -> None:
        process = start("willing")
        process.wait_until_ready()
        code, output = start("quick").end()
        assert code == 75
        assert f"process {process.popen.pid} on" in output
        assert process.status.state == "running"
        process.popen.terminate()
        assert process.end()[0] == 30

    def test_an_output_that_nobody_reads_any_more_is_no_failure(
        self, start: Callable[[str], Process]
    ) -> None:
        process = start("chatty")
        assert process.popen.stdout is not None
        process.popen.stdout.readline()
        process.popen.stdout.close()
        assert process.popen.wait(timeout=600) == 0
        assert process.status.state == "done"
