"""The step `logits`: AWS's logit validation of a target's checkpoint, apart from its server.

It is made only where the spec asks for it. What it finds is shown beside the release and decides
nothing: the graphs that it compiles are not those that are served.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from pydantic import ValidationError

from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.logits import LogitFigures, LogitReport, logits_digest
from trainyard.documents.plan import Plan, PlannedTarget
from trainyard.errors import BadInput, NotFound, OutOfCapacity, Refused
from trainyard.lanes.registry import get_lane
from trainyard.materialize import materialize_checkpoint
from trainyard.measure.logits import LogitJob
from trainyard.measure.machine import describe_machine
from trainyard.names import check_relative_path
from trainyard.references import prompts_file, read_prompts
from trainyard.serving.process import base_environment
from trainyard.spec.model import LOGIT_LANE, LogitValidation
from trainyard.steps.compile import planned_target
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.measure import restore_assets
from trainyard.steps.restoring import told_to
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import checkpoint_manifest_key, logits_key, plan_key

LONGEST = 2048
"""Tokens of the graphs that are compiled for it, at most: the shorter, the sooner it is done."""


def validate_logits(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Validate the logits of a target's checkpoint on this machine's devices, or find it done.

    Returns:
        The key of the report. That logits differ is a finding and no error.

    Raises:
        BadInput: the spec does not ask for it, the target is of another lane, or the image lacks
            AWS's tool.
        NotFound: the checkpoint is not stored.
        Refused: the model cannot be loaded or run, or the tool fails.
        OutOfCapacity: there is not enough memory.
    """
    planned = planned_target(plan, target_name)
    settings = plan.spec.gates.accuracy.logit_validation
    if settings is None or planned.target.lane != LOGIT_LANE:
        raise BadInput(
            f"The logits of target {target_name} are not to be validated.",
            hint=f"Give gates.accuracy.logit_validation, and a target of lane {LOGIT_LANE}.",
        )
    key = logits_key(planned.measurement_id, logits_digest(settings))
    try:
        return _result(key, read_document(context.store, key, LogitReport), reused=True)
    except NotFound:
        pass
    checkpoint = read_document(
        context.store, checkpoint_manifest_key(plan.spec.model, plan.revision), CheckpointManifest
    )
    context.progress.say("Restoring the checkpoint.")
    means = told_to(context.progress, checkpoint.files)
    model_dir = materialize_checkpoint(context.store, checkpoint, context.work_dir / "model", means)
    figures = _validate(plan, planned, settings, model_dir, context)
    report = LogitReport(
        provenance=Provenance.of(context.settings, plan_key(plan.plan_id), plan.checkpoint_key),
        measurement_id=planned.measurement_id,
        model=plan.spec.model,
        revision=plan.revision,
        checkpoint_digest=checkpoint.digest,
        target=target_name,
        settings=settings,
        figures=figures,
        machine=describe_machine(),
    )
    context.ensure_held()
    create_document(context.store, key, report)
    return _result(key, report, reused=False)


def _result(key: str, report: LogitReport, *, reused: bool) -> StepResult:
    figures = report.figures
    word = "alike" if figures.within else "not alike"
    good = sum(figures.prompts)
    return StepResult(
        key=key,
        reused=reused,
        message=f"Logits on the device and of the checkpoint are {word} ({good} of "
        f"{len(figures.prompts)} prompts within the fixed tolerances); {report.label}.",
    )


def _validate(
    plan: Plan,
    planned: PlannedTarget,
    settings: LogitValidation,
    model_dir: Path,
    context: StepContext,
) -> LogitFigures:
    """Run AWS's tool in the serving environment and return what it found."""
    name = prompts_file(plan.spec)
    if name is None:
        raise BadInput(f"The spec of {plan.spec.model} has no prompts.")
    prompts = read_prompts(
        restore_assets(plan, context) / check_relative_path(name), settings.num_prompts
    )
    target = planned.target
    job = LogitJob(
        model_dir=str(model_dir.absolute()),
        served_model_name=plan.spec.client_model_name,
        prompts=prompts,
        output_tokens=settings.output_tokens,
        tensor_parallel_size=target.tensor_parallel_size,
        max_model_len=min(target.max_model_len, LONGEST),
    )
    out = context.work_dir / "logits.json"
    out.unlink(missing_ok=True)
    python = context.settings.serving_interpreter
    server = get_lane(target.lane).command(
        target,
        python=python,
        model_dir=model_dir,
        cache_dir=context.work_dir / "logits-cache",
        served_model_name=job.served_model_name,
        port=0,
        cache_only=False,
    )
    env = {
        **base_environment(),
        **server.env,
        "VLLM_NEURON_GOLDEN_CACHE_DIR": str((context.work_dir / "goldens").absolute()),
        "HF_HUB_OFFLINE": "1",
    }
    context.progress.say("Computing the goldens on the CPU, then the logits on the device.")
    try:
        done = subprocess.run(
            [str(python.absolute()), "-P", "-m", "trainyard.measure.logits", str(out.absolute())],
            input=job.model_dump_json(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            check=False,
        )
    except OSError as error:
        raise BadInput(
            f"The serving environment's Python ({python}) cannot be run: {error.strerror}.",
            hint="Set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
        ) from error
    said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
    if done.returncode == BadInput.exit_code:
        raise BadInput(said)
    if done.returncode < 0 or done.returncode == OutOfCapacity.exit_code:
        raise OutOfCapacity(
            f"There is not enough memory to validate logits: {said}",
            hint="Use a machine with more, or leave gates.accuracy.logit_validation out.",
        )
    try:
        return LogitFigures.model_validate_json(out.read_bytes())
    except (OSError, ValidationError) as error:
        raise Refused(f"Logits cannot be validated: {said}") from error
