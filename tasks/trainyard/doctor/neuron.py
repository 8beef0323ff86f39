"""`trainyard doctor neuron`: proves on one node what an image can do there.

With a small model it goes through everything that a release will rest on: it compiles on the device
and on the CPU and compares what came out, restores the bundle into a fresh folder, starts from it
without compiling, measures and drains, and shows that a start without one of its graphs ends
instead of compiling. What was seen becomes a transcript; signed and stored, it turns "unproven"
into "proven" for the image, the instance and the lane. Lane `cpu` can be proven like this too, on
any machine.

Everything happens in a store of its own in the work folder, so that nothing found elsewhere passes
for a proof. A run that was cut goes on: a compile's finished graphs stay.
"""

from __future__ import annotations

import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from trainyard.canonical import digest, short
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.plan import Plan, PlannedTarget, ReleaseRequest
from trainyard.documents.proof import Proof, ProofState, ProofStep
from trainyard.errors import BadInput, CacheMiss, Refused, TrainyardError
from trainyard.lanes.native_cache import COMPILE_CACHE, MARK
from trainyard.lanes.neuron_device import driver_version
from trainyard.lanes.nxdi_folder import MODEL
from trainyard.lanes.protocol import Lane
from trainyard.lanes.registry import get_lane
from trainyard.lanes.start_check import refuse_misfit
from trainyard.materialize import materialize_bundle, materialize_checkpoint
from trainyard.measure.machine import describe_machine
from trainyard.settings import Settings
from trainyard.spec.model import Target
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import Progress, StepContext
from trainyard.steps.download import download
from trainyard.steps.lane_server import RunningServer, ask, lane_server
from trainyard.steps.plan import plan as make_plan
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import checkpoint_manifest_key

REQUESTS = 20
"""Requests that are measured, one after the other."""
OUTPUT_TOKENS = 16
DRAIN_TOKENS = 64
MAX_S = 2 * 3600.0
"""After so long nothing new is begun."""

_REQUEST_TIMEOUT_S = 300.0
_LOOK_TIMEOUT_S = 5.0
_LOOK_S = 0.1
_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})? ([\d.e+]+)$", re.MULTILINE)
_DEVICE = "compile on the device"
_CPU = "compile on a CPU"
_COMPARE = "compare the keys"
_RESTORE = "restore into a fresh folder"
_START = "start from the bundle alone"
_MEASURE = "measure"
_DRAIN = "drain"
_MISS = "a start that lacks code"
STEPS = ("plan", "download", _DEVICE, _CPU, _COMPARE, _RESTORE, _START, _MEASURE, _DRAIN, _MISS)
"""In their order."""
NOT_NEEDED = (_CPU, _COMPARE)
"""What may fail without the image being unproven: then only `compile_on: cpu` is."""


@dataclass(frozen=True)
class Wanted:
    """What is to be proven."""

    model: str
    target: str
    revision: str | None = None
    max_s: float = MAX_S


class Skip(Exception):
    """The lane has no such thing."""


@dataclass
class _Run:
    """One run on its way."""

    settings: Settings
    wanted: Wanted
    progress: Progress
    folder: Path
    clock: Callable[[], float]
    began: float = 0.0
    steps: list[ProofStep] = field(default_factory=list)
    plan: Plan | None = None
    bundles: dict[str, BundleManifest] = field(default_factory=dict)
    """By where it was compiled: `device` or `cpu`."""

    def context(self, name: str) -> StepContext:
        """Return the surroundings of one step."""
        folder = self.folder / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        store = FolderStore(self.folder / "store")
        own = self.settings.model_copy(update={"store": str(self.folder / "store")})
        return StepContext(own, store, self.progress, folder)

    @property
    def planned(self) -> PlannedTarget:
        """The one target."""
        assert self.plan is not None
        return self.plan.target(self.wanted.target)

    @property
    def lane(self) -> Lane:
        """Its lane."""
        return get_lane(self.planned.target.lane)

    def failed(self) -> bool:
        """Did something fail that all the rest needs?"""
        return any(step.state == "failed" and step.name not in NOT_NEEDED for step in self.steps)


def prove(
    settings: Settings,
    wanted: Wanted,
    progress: Progress,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Proof:
    """Go through all steps and return the transcript, not yet signed.

    Args:
        settings: of this installation; its store is not touched.
        wanted: model and target.
        progress: told what happens.
        clock: seconds, for the limit.

    Raises:
        BadInput, NotFound: there is no such model or target, or it breaks a rule.
    """
    folder = settings.work_root / "doctor" / f"{wanted.model}-{wanted.target}"
    run = _Run(settings, wanted, progress, folder, clock, began=clock())
    _plan(run)
    for name, step in (
        ("download", _download),
        (_DEVICE, lambda r: _compile(r, "device")),
        (_CPU, _compile_on_cpu),
        (_COMPARE, _compare),
        (_RESTORE, _restore),
    ):
        _try(run, name, step)
    if run.failed():
        for name in (_START, _MEASURE, _DRAIN, _MISS):
            _skip(run, name, "Not tried: a step before it failed.")
    else:
        _serve(run)
        _try(run, _MISS, _forced_miss)
    proof = _transcript(run)
    _clean_up(folder, keep_logs=not proof.proven)
    return proof


def _clean_up(folder: Path, *, keep_logs: bool) -> None:
    """Remove what was made; only a run that is killed leaves anything to go on with."""
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    large = [folder / name for name in ("store", "fresh", "spoiled")]
    large += [path for name in ("model", "cache") for path in folder.glob(f"work/*/{name}")]
    for path in large:
        shutil.rmtree(path, ignore_errors=True)


def _plan(run: _Run) -> None:
    """Plan, which refuses bad input; that is no finding about the image, so it is raised."""
    began = run.clock()
    request = ReleaseRequest(
        model=run.wanted.model, revision=run.wanted.revision, targets=(run.wanted.target,)
    )
    context = run.context("plan")
    made = read_document(context.store, make_plan(request, context).key, Plan)
    run.plan = _variant(made, "device")
    planned = run.planned
    tools = {name: planned.toolchain[name] for name in sorted(planned.toolchain)}
    _note(run, "plan", "passed", "No rule is broken; the toolchain is known.", began, tools)


def _variant(plan: Plan, compile_on: str) -> Plan:
    """Return the plan with its one target compiled elsewhere, under the key that goes with it."""
    (planned,) = plan.targets
    target = planned.target
    if target.neuron is None or target.neuron.compile_on == compile_on:
        return plan
    neuron = target.neuron.model_copy(update={"compile_on": compile_on})
    other = target.model_copy(update={"neuron": neuron})
    inputs = get_lane(target.lane).key_inputs(
        other, architecture_digest=plan.architecture_digest, toolchain=planned.toolchain
    )
    changed = planned.model_copy(
        update={"target": other, "key_inputs": inputs, "compile_key": digest(dict(inputs))}
    )
    return plan.model_copy(update={"targets": (changed,)})


def _download(run: _Run) -> tuple[str, dict[str, Any]]:
    assert run.plan is not None
    return download(run.plan, run.context("download")).message, {}


def _compile(run: _Run, where: str) -> tuple[str, dict[str, Any]]:
    assert run.plan is not None
    context = run.context(f"compile-{where}")
    result = compile_bundle(_variant(run.plan, where), run.wanted.target, context)
    bundle = read_document(context.store, result.key, BundleManifest)
    run.bundles[where] = bundle
    seen = {"files": len(bundle.files), "neffs": len(bundle.neffs), "compile_s": bundle.compile_s}
    return result.message, {**seen, "dropped": list(bundle.dropped)}


def _compile_on_cpu(run: _Run) -> tuple[str, dict[str, Any]]:
    target = run.planned.target
    if target.lane != "neuron-native" or target.neuron is None:
        raise Skip(f"Lane {target.lane} compiles where it runs.")
    assert run.plan is not None
    (planned,) = _variant(run.plan, "cpu").targets
    problems = run.lane.problems(planned.target)
    if problems:
        raise Skip(problems[0])
    return _compile(run, "cpu")


def _compare(run: _Run) -> tuple[str, dict[str, Any]]:
    if "cpu" not in run.bundles:
        raise Skip("There is only one bundle.")
    device, cpu = (_graphs(run.bundles[where]) for where in ("device", "cpu"))
    seen = {"graphs": sorted(device), "only_device": sorted(device - cpu),
            "only_cpu": sorted(cpu - device)}  # fmt: skip
    if device != cpu:
        raise Refused(
            f"{len(device - cpu)} of the device's {len(device)} graphs were not made by the CPU, "
            f"and {len(cpu - device)} others were: a bundle from a CPU would miss on a device."
        )
    return f"Device and CPU made the same {len(device)} graphs.", seen


def _graphs(bundle: BundleManifest) -> set[str]:
    """Return the cache's own keys of the graphs in a bundle of lane `neuron-native`."""
    return {file.path.split("/")[-2] for file in bundle.files if file.path.endswith(f"/{MARK}")}


def _restore(run: _Run) -> tuple[str, dict[str, Any]]:
    bundle = run.bundles["device"]
    shutil.rmtree(run.folder / "fresh", ignore_errors=True)
    _materialize(run, run.folder / "fresh")
    size = sum(file.size for file in bundle.files)
    return (
        f"{len(bundle.files)} files of the bundle, {size / 1e6:.1f} MB, and the checkpoint.",
        {"files": len(bundle.files), "bytes": size},
    )


def _materialize(run: _Run, folder: Path) -> None:
    """Bring checkpoint and bundle to a folder, every file checked."""
    assert run.plan is not None
    store = run.context("restore").store
    key = checkpoint_manifest_key(run.plan.spec.model, run.plan.revision)
    materialize_checkpoint(store, read_document(store, key, CheckpointManifest), folder / "model")
    materialize_bundle(store, run.bundles["device"], folder / "cache")


def _serve(run: _Run) -> None:
    """Start from the bundle, measure, and drain: three steps with one server."""
    began = run.clock()
    cache = run.folder / "fresh" / "cache"
    before = run.lane.snapshot(cache)
    try:
        with _server(run, cache, "serve") as server:
            proof = run.lane.prove_start(
                log=server.process.log_text(),
                before=before,
                after=run.lane.snapshot(cache),
                bundle=run.bundles["device"],
            )
            if not proof.used_bundle:
                raise CacheMiss(proof.reason)
            seen = {"ready_s": round(server.ready_s, 2), "engine_init_s": proof.engine_init_s}
            _note(run, _START, "passed", proof.reason, began, seen)
            began = run.clock()
            _try(run, _MEASURE, lambda r: _measure(r, server))
            _try(run, _DRAIN, lambda r: _drain(r, server))
    except TrainyardError as error:
        # Whatever comes after the start is noted by its own step, but for the server's end.
        noted = {step.name for step in run.steps}
        late = [name for name in (_START, _MEASURE, _DRAIN) if name not in noted]
        _note(run, late[0] if late else "stop", "failed", error.message, began, {})
        for name in late[1:]:
            _skip(run, name, "Not tried: the server did not start from its bundle.")


@contextmanager
def _server(run: _Run, cache: Path, name: str) -> Iterator[RunningServer]:
    assert run.plan is not None
    with lane_server(
        run.lane,
        run.planned,
        run.context(name),
        model_dir=run.folder / "fresh" / "model",
        cache_dir=cache,
        served_model_name=run.plan.spec.client_model_name,
        cache_only=True,
    ) as server:
        ask(server, run.plan.spec.client_model_name)
        yield server


def _measure(run: _Run, server: RunningServer) -> tuple[str, dict[str, Any]]:
    """Measure single requests; how good the model is is not the question here."""
    seconds = []
    for _ in range(REQUESTS):
        began = time.monotonic()
        _complete(run, server, OUTPUT_TOKENS)
        seconds.append(time.monotonic() - began)
    seen = {
        "requests": REQUESTS,
        "output_tokens": OUTPUT_TOKENS,
        "p50_ms": round(statistics.median(seconds) * 1000, 2),
        "max_ms": round(max(seconds) * 1000, 2),
    }
    return f"{REQUESTS} requests, one after the other: p50 {seen['p50_ms']} ms.", seen


def _drain(run: _Run, server: RunningServer) -> tuple[str, dict[str, Any]]:
    """Ask for an answer, tell the server to stop, and expect the answer all the same."""
    errors: list[str] = []
    answering = threading.Event()

    def request() -> None:
        try:
            _stream(run, server, DRAIN_TOKENS, answering.set)
        except TrainyardError as error:
            errors.append(error.message)
        finally:
            answering.set()

    thread = threading.Thread(target=request, name="drained")
    thread.start()
    answering.wait()
    began = time.monotonic()
    if not run.lane.finishes_requests:
        _wait_idle(server, run.settings.drain_timeout_s)
    server.process.stop(run.settings.drain_timeout_s)
    took = time.monotonic() - began
    thread.join()
    if errors:
        raise Refused(f"A request that ran when the server was told to stop was lost: {errors[0]}")
    left = server.process.processes()
    if left:
        raise Refused(f"{len(left)} processes of the server are left.")
    return f"A running request was answered, and the server ended in {took:.1f} s.", {
        "seconds": round(took, 2)
    }


def _wait_idle(server: RunningServer, timeout_s: float) -> None:
    """Wait until no request runs, as the pods of such a lane do before they end."""
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=_LOOK_TIMEOUT_S) as client:
        while time.monotonic() < deadline:
            page = client.get(f"{server.process.url}/metrics").text
            counts = [float(number) for number in _RUNNING.findall(page)]
            if counts and sum(counts) == 0:
                return
            time.sleep(_LOOK_S)


def _body(run: _Run, tokens: int) -> dict[str, Any]:
    assert run.plan is not None
    return {
        "model": run.plan.spec.client_model_name,
        "prompt": [2, 3, 4, 5],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def _stream(run: _Run, server: RunningServer, tokens: int, on_first: Callable[[], None]) -> None:
    """Read a streamed answer to its end; raise Refused if it breaks off."""
    body = {**_body(run, tokens), "stream": True}
    url, ended = f"{server.process.url}/v1/completions", False
    try:
        with (
            httpx.Client(trust_env=False, timeout=_REQUEST_TIMEOUT_S) as client,
            client.stream("POST", url, json=body) as answer,
        ):
            for line in answer.iter_lines():
                on_first()
                ended = ended or line.strip() == "data: [DONE]"
    except httpx.HTTPError as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    if not ended:
        raise Refused("its stream has no end.")


def _complete(run: _Run, server: RunningServer, tokens: int) -> None:
    try:
        with httpx.Client(trust_env=False, timeout=_REQUEST_TIMEOUT_S) as client:
            answer = client.post(f"{server.process.url}/v1/completions", json=_body(run, tokens))
    except httpx.HTTPError as error:
        raise Refused(f"A request got no answer: {error}") from error
    if answer.status_code != 200:
        raise Refused(f"A request was answered with {answer.status_code}: {answer.text[:200]}")


def _forced_miss(run: _Run) -> tuple[str, dict[str, Any]]:
    """Start from a bundle that lacks a part, and expect the start to say so and to end."""
    spoiled = run.folder / "spoiled"
    shutil.rmtree(spoiled, ignore_errors=True)
    shutil.copytree(run.folder / "fresh" / "cache", spoiled)
    what = _SPOILERS[run.planned.target.lane](spoiled)
    refuse_misfit(run.lane, run.planned.target, spoiled)
    before = run.lane.snapshot(spoiled)
    try:
        with _server(run, spoiled, "miss") as server:
            after = run.lane.snapshot(spoiled)
            proof = run.lane.prove_start(
                log=server.process.log_text(), before=before, after=after,
                bundle=run.bundles["device"],
            )  # fmt: skip
    except CacheMiss as error:
        return f"Without {what} the start ended: {error.message}", {"lacked": what}
    if run.planned.target.lane == "cpu" and not proof.used_bundle:
        return f"Without {what} the start compiled, and it was noticed.", {"lacked": what}
    raise Refused(f"Without {what} the server started all the same: {proof.reason}")


def _spoil_native(cache: Path) -> str:
    """Give one entry another key, so that the graph is not found, and the rest is as it was."""
    entries = sorted((cache / COMPILE_CACHE).glob(f"*/{MARK}"))
    entry = entries[0].parent
    other = entry.with_name(entry.name[::-1])
    entry.rename(other)
    return f"graph {entry.name}"


def _spoil_nxdi(cache: Path) -> str:
    """Cut the compiled model, so that the plugin cannot load it."""
    (path,) = cache.rglob(MODEL)
    with path.open("r+b") as model:
        model.truncate(path.stat().st_size // 2)
    return f"a half of {MODEL}"


def _spoil_cpu(cache: Path) -> str:
    """Remove the compiled objects of TorchInductor."""
    found = sorted(cache.rglob("*.so"))
    for path in found:
        path.unlink()
    return f"{len(found)} compiled objects"


_SPOILERS: Mapping[str, Callable[[Path], str]] = {
    "neuron-native": _spoil_native,
    "neuron-nxdi": _spoil_nxdi,
    "cpu": _spoil_cpu,
}


def _try(run: _Run, name: str, step: Callable[[_Run], tuple[str, dict[str, Any]]]) -> None:
    """Run one step and note what came of it; nothing is begun after a failure or too late."""
    if run.failed():
        _skip(run, name, "Not tried: a step before it failed.")
        return
    began = run.clock()
    if began - run.began > run.wanted.max_s:
        _note(run, name, "failed", f"Not begun: {run.wanted.max_s:.0f} s are over.", began, {})
        return
    run.progress.say(f"{name[0].upper()}{name[1:]}.")
    try:
        detail, seen = step(run)
    except Skip as skipped:
        _skip(run, name, str(skipped))
    except TrainyardError as error:
        _note(run, name, "failed", error.message, began, {"exit_code": error.exit_code})
    else:
        _note(run, name, "passed", detail, began, seen)


def _skip(run: _Run, name: str, why: str) -> None:
    _note(run, name, "skipped", why, run.clock(), {})


def _note(
    run: _Run, name: str, state: ProofState, detail: str, began: float, seen: Mapping[str, Any]
) -> None:
    seconds = round(run.clock() - began, 2)
    step = ProofStep(
        name=name,
        state=state,
        detail=detail,
        seconds=seconds,
        seen=dict(seen),
        needed=name not in NOT_NEEDED,
    )
    run.steps.append(step)
    run.progress.say(f"{name}: {state}. {detail}")


def _transcript(run: _Run) -> Proof:
    assert run.plan is not None
    planned, driver = run.planned, driver_version()
    target: Target = planned.target
    bundle = run.bundles.get("device")
    made = Proof(
        provenance=Provenance.of(run.settings),
        proof_id="",
        lane=target.lane,
        instance=target.instance,
        image=target.neuron.image if target.neuron else run.settings.image,
        sdk=target.neuron.sdk if target.neuron else "",
        driver=driver,
        toolchain=planned.toolchain,
        machine=describe_machine(),
        model=run.plan.spec.model,
        revision=run.plan.revision,
        target=target.name,
        compile_key=planned.compile_key,
        feature_bits=tuple(sorted({each.feature_bits for each in bundle.neffs})) if bundle else (),
        steps=tuple(run.steps),
    )
    content = made.model_dump(mode="json", by_alias=True)
    return made.model_copy(update={"proof_id": f"{run.plan.spec.model}-{short(digest(content))}"})


def refuse_without_device(settings: Settings, target: Target) -> None:
    """Raise BadInput for a Neuron lane on a machine that cannot run it."""
    if target.neuron is not None and not driver_version():
        raise BadInput(
            f"Lane {target.lane} is proven on a node of {target.instance}, and this machine has no "
            "Neuron driver.",
            hint="Run it there, in the image that is to be proven.",
        )
    if target.neuron is not None and not target.neuron.image:
        raise BadInput(
            f"Target {target.name} names no image, and a proof is about one.",
            hint="Give `neuron.image`, best with its digest.",
        )
    if settings.image and target.neuron and settings.image != target.neuron.image:
        raise BadInput(
            f"This runs in {settings.image}, and target {target.name} names {target.neuron.image}.",
            hint="Run it in that image, or correct `neuron.image`.",
        )
